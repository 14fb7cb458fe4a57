"""RayTuneReport: reports metrics and checkpoints of a trial to Ray Tune."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from treadle.callbacks.reporting.to_ray import RayReport
from treadle_fabric import MisconfigurationException, on_rank_zero, rank_zero_info

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = ["RayTuneReport"]


class RayTuneReport(RayReport):
    """Report metrics, and a checkpoint of the run, to Ray Tune after each validation; the sanity check does not count.

    Each report is one of Ray's training iterations. Without validation, the end of a training epoch reports. On several
    ranks, rank 0 reports; all of them have to be on one machine for the checkpoint. A trial that Ray stops ends as
    after ``trainer.should_stop = True``, with its loggers closed, and then leaves the function of the trial.

    A trial that runs workers of Ray Train reports with :class:`RayTrainReportCallback`.

    Args:
        metrics: the names of logged metrics, or a mapping from reported to logged names. Default: all that were logged.
        save_checkpoints: report a checkpoint, too. A trial that failed, or was paused, then goes on from
            :attr:`ckpt_path`.
        filename: the checkpoint's name in Ray's folder.

    Raises:
        MissingPackageError: ray is not installed.
        MisconfigurationException: the run is no trial of Ray Tune; or a metric was not logged when it is reported.

    Example::

        def trial(config):
            report = RayTuneReport({"loss": "val_loss"})
            trainer = Trainer(max_epochs=10, callbacks=report, enable_progress_bar=False)
            trainer.fit(Net(**config), train_loader, val_loader, ckpt_path=report.ckpt_path)
    """

    def __init__(
        self,
        metrics: str | Sequence[str] | Mapping[str, str] | None = None,
        save_checkpoints: bool = True,
        filename: str = "checkpoint.ckpt",
    ) -> None:
        super().__init__(metrics, save_checkpoints, filename, "tune")

    def _newest_folder(self) -> str | None:
        from ray import tune  # an extra, and heavy

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Ray says outside of a trial
            checkpoint = tune.get_checkpoint()
        return None if checkpoint is None else str(checkpoint.to_directory())

    def _check(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and not _in_trial():
            raise MisconfigurationException(
                "RayTuneReport reports to a trial of Ray Tune, and this process runs none. Call fit in the function "
                "that ray.tune.Tuner runs, with a strategy that starts no processes in fit, such as 'ddp'. In a "
                "worker of Ray Train, use RayTrainReportCallback."
            )

    def _staging(self, trainer: Trainer) -> str | None:
        return None

    def _tell(self, trainer: Trainer, metrics: dict[str, float], folder: str | None) -> None:
        if on_rank_zero(trainer.strategy, lambda: _is_stopped(metrics, folder), "could not report to Ray Tune"):
            trainer.should_stop = True
            self.raised_after_fit = SystemExit(0)
            rank_zero_info("Ray Tune has stopped the trial.")


def _in_trial() -> bool:
    from ray import tune  # an extra, and heavy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Ray says outside of a trial
        return tune.get_context().get_trial_id() is not None


def _is_stopped(metrics: dict[str, float], folder: str | None) -> bool:
    """Report, and return whether the trial is to end."""
    from ray import tune  # an extra, and heavy

    checkpoint = None if folder is None else tune.Checkpoint.from_directory(folder)
    try:
        tune.report(metrics, checkpoint=checkpoint)
    except SystemExit:  # which Ray raises to end the thread of the trial; the run ends in order first
        return True
    return False
