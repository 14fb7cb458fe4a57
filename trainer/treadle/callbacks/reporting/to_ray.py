"""What the reports to Ray Tune and to Ray Train have in common."""

from __future__ import annotations

import os
import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from treadle.callbacks.callback import Callback
from treadle.metrics.values import to_floats
from treadle_fabric import MisconfigurationException, near_names, on_rank_zero, require_package

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["RayReport"]


class RayReport(Callback):
    """The base of reports to Ray: which metrics, when, and a checkpoint with them.

    Args:
        metrics: the names of logged metrics, or a mapping from reported to logged names. Default: all that were logged.
        save_checkpoints: report a checkpoint, too.
        filename: the checkpoint's name in Ray's folder.
        extra: the extra of Treadle that the package ray belongs to here.

    Raises:
        MissingPackageError: ray is not installed.
        MisconfigurationException: an argument cannot work.
    """

    monitors: ClassVar[bool] = True
    call_order: ClassVar[int] = 1  # as checkpoints, which have the state of all other callbacks

    def __init__(
        self, metrics: str | Sequence[str] | Mapping[str, str] | None, save_checkpoints: bool, filename: str, extra: str
    ) -> None:
        who = type(self).__name__
        require_package("ray", who, extra)
        names = [metrics] if isinstance(metrics, str) else metrics
        pairs = names if names is None or isinstance(names, Mapping) else {name: name for name in names}
        if pairs is not None and not all(isinstance(name, str) for pair in pairs.items() for name in pair):
            raise MisconfigurationException(
                f"{who}(metrics={metrics!r}): names, or a mapping from reported to logged names."
            )
        if not filename or os.path.basename(filename) != filename:
            raise MisconfigurationException(f"{who}(filename={filename!r}): it must be a name without a folder.")
        self.metrics = None if pairs is None else dict(pairs)
        self.save_checkpoints = save_checkpoints
        self.filename = filename

    @property
    def ckpt_path(self) -> str | None:
        """The checkpoint that the run goes on from, for ``fit(ckpt_path=...)``; None if it begins."""
        folder = self._newest_folder()
        return None if folder is None else os.path.join(folder, self.filename)

    @abstractmethod
    def _newest_folder(self) -> str | None:
        """The folder with the checkpoint that was reported last; None without one."""

    @abstractmethod
    def _check(self, trainer: Trainer) -> None:
        """Refuse a run that cannot report."""

    @abstractmethod
    def _staging(self, trainer: Trainer) -> str | None:
        """The folder in which checkpoints are written before Ray takes them; None for that of temporary files."""

    @abstractmethod
    def _tell(self, trainer: Trainer, metrics: dict[str, float], folder: str | None) -> None:
        """Report; every rank calls this, and has the path of rank 0's folder with the checkpoint."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run that cannot report."""
        self.raised_after_fit = None
        if stage == "fit":
            self._check(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._report(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, where there is no validation."""
        if not trainer.enable_validation:
            self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        found = self._chosen(to_floats(trainer.callback_metrics))
        if not self.save_checkpoints:
            self._tell(trainer, found, None)
            return
        with tempfile.TemporaryDirectory(prefix="treadle-ray-", dir=self._staging(trainer)) as own:
            folder = on_rank_zero(trainer.strategy, lambda: own, "could not make a folder")
            trainer.save_checkpoint(os.path.join(folder, self.filename))
            trainer.strategy.wait_for_saves("could not write the checkpoint")
            self._tell(trainer, found, folder)

    def _chosen(self, found: dict[str, Any]) -> dict[str, Any]:
        """The metrics to report.

        Raises:
            MisconfigurationException: nothing has logged one of them.
        """
        if self.metrics is None:
            return found
        for name in self.metrics.values():
            if name not in found:
                raise MisconfigurationException(
                    f"{type(self).__name__}: nothing has logged {name!r}. {near_names(name, found)} Log it before the "
                    "end of validation, or report another."
                )
        return {reported: found[name] for reported, name in self.metrics.items()}
