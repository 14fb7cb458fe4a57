"""RayTuneReport: reports metrics and checkpoints of a trial to Ray Tune."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from treadle.callbacks.callback import Callback
from treadle.metrics.values import to_floats
from treadle_fabric import MisconfigurationException, near_names, on_rank_zero, rank_zero_info, require_package

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["RayTuneReport"]


class RayTuneReport(Callback):
    """Report metrics, and a checkpoint of the run, to Ray Tune after each validation; the sanity check does not count.

    Each report is one of Ray's training iterations. Without validation, the end of a training epoch reports. On several
    ranks, rank 0 reports; all of them have to be on one machine for the checkpoint. A trial that Ray stops ends as
    after ``trainer.should_stop = True``, with its loggers closed, and then leaves the function of the trial.

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

    monitors: ClassVar[bool] = True
    call_order: ClassVar[int] = 1  # as checkpoints, which have the state of all other callbacks

    def __init__(
        self,
        metrics: str | Sequence[str] | Mapping[str, str] | None = None,
        save_checkpoints: bool = True,
        filename: str = "checkpoint.ckpt",
    ) -> None:
        require_package("ray", "RayTuneReport", "tune")
        names = [metrics] if isinstance(metrics, str) else metrics
        pairs = names if names is None or isinstance(names, Mapping) else {name: name for name in names}
        if pairs is not None and not all(isinstance(name, str) for pair in pairs.items() for name in pair):
            raise MisconfigurationException(
                f"RayTuneReport(metrics={metrics!r}): names, or a mapping from reported to logged names."
            )
        if not filename or os.path.basename(filename) != filename:
            raise MisconfigurationException(
                f"RayTuneReport(filename={filename!r}): it must be a name without a folder."
            )
        self.metrics = None if pairs is None else dict(pairs)
        self.save_checkpoints = save_checkpoints
        self.filename = filename

    @property
    def ckpt_path(self) -> str | None:
        """The checkpoint that the trial goes on from, for ``fit(ckpt_path=...)``; None if it begins."""
        from ray import tune  # an extra, and heavy

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Ray says outside of a trial
            checkpoint = tune.get_checkpoint()
        if checkpoint is None:
            return None
        return os.path.join(checkpoint.to_directory(), self.filename)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run that is no trial."""
        self.raised_after_fit = None
        if stage == "fit" and trainer.is_global_zero and not _in_trial():
            raise MisconfigurationException(
                "RayTuneReport reports to a trial of Ray Tune, and this process runs none. Call fit in the function "
                "that ray.tune.Tuner runs, with a strategy that starts no processes in fit, such as 'ddp'."
            )

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
        found = to_floats(trainer.callback_metrics)
        if self.metrics is not None:
            for name in self.metrics.values():
                if name not in found:
                    raise MisconfigurationException(
                        f"RayTuneReport: nothing has logged {name!r}. {near_names(name, found)} Log it before the end "
                        "of validation, or report another."
                    )
            found = {reported: found[name] for reported, name in self.metrics.items()}
        with tempfile.TemporaryDirectory(prefix="treadle-ray-") as own:
            folder = on_rank_zero(trainer.strategy, lambda: own, "could not make a folder")
            if self.save_checkpoints:
                trainer.save_checkpoint(os.path.join(folder, self.filename))
                trainer.strategy.wait_for_saves("could not write the checkpoint")
            stopped = on_rank_zero(
                trainer.strategy,
                lambda: _tell(found, folder if self.save_checkpoints else None),
                "could not report to Ray Tune",
            )
        if stopped:
            trainer.should_stop = True
            self.raised_after_fit = SystemExit(0)
            rank_zero_info("Ray Tune has stopped the trial.")


def _in_trial() -> bool:
    from ray import tune  # an extra, and heavy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Ray says outside of a trial
        return tune.get_context().get_trial_id() is not None


def _tell(metrics: dict[str, Any], folder: str | None) -> bool:
    """Report, and return whether the trial is to end."""
    from ray import tune  # an extra, and heavy

    checkpoint = None if folder is None else tune.Checkpoint.from_directory(folder)
    try:
        tune.report(metrics, checkpoint=checkpoint)
    except SystemExit:  # which Ray raises to end the thread of the trial; the run ends in order first
        return True
    return False
