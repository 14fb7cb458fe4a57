"""Writes the config of a run beside its logs."""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Iterator
from typing import TYPE_CHECKING

import fsspec
from jsonargparse import Namespace

from treadle.callbacks import Callback
from treadle.callbacks.checkpoints.paths import run_folder
from treadle.cli.configured.parser import LightningArgumentParser
from treadle_fabric import MisconfigurationException, on_rank_zero

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["SaveConfigCallback"]


class SaveConfigCallback(Callback):
    """Writes the config when a run begins: once, on rank 0, into the folder of the first logger.

    Args:
        parser: The parser that read the config.
        config: The config.
        config_filename: The file's name.
        overwrite: Write over the config of another run that is there. A run that goes on from a checkpoint, or has no
            logger and so no folder of its own, keeps it, and writes another config beside it, as ``config_1.yaml``.
        multifile: Write parts of the config that came from files of their own into such files again.
        save_to_log_dir: Whether the file is written; False: only :meth:`save_config` is called.

    Raises:
        MisconfigurationException: When the run begins: another config is there, and ``overwrite`` is False.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        config_filename: str = "config.yaml",
        overwrite: bool = False,
        multifile: bool = False,
        save_to_log_dir: bool = True,
    ) -> None:
        self.parser = parser
        self.config = config
        self.config_filename = config_filename
        self.overwrite = overwrite
        self.multifile = multifile
        self.save_to_log_dir = save_to_log_dir
        self.already_saved = False
        """Whether this object has written its config."""
        if not save_to_log_dir and type(self).save_config is SaveConfigCallback.save_config:
            raise MisconfigurationException(
                "SaveConfigCallback(save_to_log_dir=False) saves nothing. Override save_config, or, to save no config, "
                "pass LightningCLI(save_config_callback=None)."
            )

    # Not in `setup`: there it is not known yet whether the run goes on in the folder of an earlier one.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the config; so do the first hooks of the other methods."""
        self._save(trainer, pl_module, "fit")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, pl_module, "predict")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Override it to save the config elsewhere, with a logger for example; called on rank 0 only.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: "fit", "validate", "test" or "predict".
        """

    def _save(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.already_saved:
            return
        if self.save_to_log_dir and not trainer.fast_dev_run:
            failure = f"could not write {self.config_filename}"
            on_rank_zero(trainer.strategy, lambda: self._write(*_place(trainer)), failure)
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, stage)
        self.already_saved = True

    def _write(self, folder: str, beside: bool) -> None:
        """Write the config into a folder; ``beside``: beside another config that is there, and not instead of it."""
        files, root = fsspec.core.url_to_fs(folder)
        names = (posixpath.join(root, name) for name in self._names())
        name = next(names)
        if not self.overwrite and files.isfile(name):
            text = self.parser.dump(self.config, skip_unset=False)
            while files.isfile(name):
                if not beside:
                    raise MisconfigurationException(
                        f"{posixpath.join(folder, self.config_filename)} has the config of another run, and is not "
                        "overwritten. Let the logger choose a new version, delete the file, pass "
                        "LightningCLI(save_config_kwargs={'overwrite': True}), or, to save no config, "
                        "LightningCLI(save_config_callback=None)."
                    )
                if files.cat_file(name).decode() == text:
                    return
                name = next(names)
        files.makedirs(root, exist_ok=True)
        path = posixpath.join(folder, posixpath.basename(name))
        self.parser.save(self.config, path, skip_unset=False, overwrite=True, multifile=self.multifile)

    def _names(self) -> Iterator[str]:
        """The file's name; then, for a run that goes on with another config, the same name with a number."""
        stem, dot, ending = self.config_filename.rpartition(".")
        yield self.config_filename
        for number in itertools.count(1):
            yield f"{stem}_{number}{dot}{ending}" if dot else f"{ending}_{number}"


def _place(trainer: Trainer) -> tuple[str, bool]:
    """The folder for the config, and whether it may hold the config of another run.

    The loggers of services have no ``log_dir``, and the config lies beside the checkpoints of their run.
    """
    if not trainer.loggers or trainer.loggers[0].log_dir is not None:
        return str(trainer.log_dir), trainer.ckpt_path is not None or not trainer.loggers
    return run_folder(trainer.loggers, trainer.default_root_dir), trainer.ckpt_path is not None
