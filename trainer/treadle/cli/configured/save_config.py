"""Writes the config of a run beside its logs."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING

import fsspec
from jsonargparse import Namespace

from treadle.callbacks import Callback
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
        overwrite: Write over a file that is there. A file with the same content is none.
        multifile: Write parts of the config that came from files of their own into such files again.
        save_to_log_dir: Whether the file is written; False: only :meth:`save_config` is called.
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, and call :meth:`save_config` on rank 0.

        Raises:
            MisconfigurationException: Another config is there, and ``overwrite`` is False.
        """
        if self.already_saved:
            return
        if self.save_to_log_dir and not trainer.fast_dev_run:
            folder = str(trainer.log_dir)
            on_rank_zero(trainer.strategy, lambda: self._write(folder), f"could not write {self.config_filename}")
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, stage)
        self.already_saved = True

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Override it to save the config elsewhere, with a logger for example; called on rank 0 only.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: "fit", "validate", "test" or "predict".
        """

    def _write(self, folder: str) -> None:
        path = posixpath.join(folder, self.config_filename)
        files, plain = fsspec.core.url_to_fs(path)
        if not self.overwrite and files.isfile(plain):
            text = self.parser.dump(self.config, skip_unset=False)
            if files.cat_file(plain).decode() == text:
                return
            raise MisconfigurationException(
                f"{path} has the config of another run, and is not overwritten. Let the logger choose a new version, "
                "delete the file, pass LightningCLI(save_config_kwargs={'overwrite': True}), or, to save no config, "
                "LightningCLI(save_config_callback=None)."
            )
        files.makedirs(files._parent(plain), exist_ok=True)
        self.parser.save(self.config, path, skip_unset=False, overwrite=True, multifile=self.multifile)
