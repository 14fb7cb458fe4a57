"""OptunaPruning: ends the trials of an Optuna study that are not worth going on with."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar

from treadle.callbacks.callback import Callback
from treadle.callbacks.monitoring.monitored_metric import MonitoredMetric
from treadle_fabric import MisconfigurationException, on_rank_zero, rank_zero_info, require_package

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["OptunaPruning"]


class OptunaPruning(Callback):
    """Report a metric to an Optuna trial after each validation, and end the run when the study's pruner says so.

    A pruned run ends as after ``trainer.should_stop = True``: not before ``min_epochs`` and ``min_steps``, with its
    last hooks, and with its loggers closed. Then ``fit`` raises :class:`optuna.TrialPruned`, which ``study.optimize``
    takes. The pruner's steps are validations, counted from 0; without validation they are training epochs. The sanity
    check does not count.

    On several ranks, rank 0 reports and decides, and ``fit`` raises on all ranks. With a strategy that starts the
    processes in ``fit`` (``"ddp_fork"``), the study stays in the process that called ``fit``, and learns there what was
    reported.

    Args:
        trial: the trial. Ranks other than 0 may pass None.
        monitor: the name of a logged metric, the one that the study minimizes or maximizes.

    Raises:
        MissingPackageError: optuna is not installed.
        MisconfigurationException: ``trial`` is no trial; and in training, when every hook that logs has run without
            logging ``monitor``, or when rank 0 has no trial.

    Example::

        def objective(trial):
            model = Net(lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True))
            trainer = Trainer(max_epochs=10, callbacks=OptunaPruning(trial, "val_loss"))
            trainer.fit(model, train_loader, val_loader)
            return trainer.callback_metrics["val_loss"].item()
    """

    monitors: ClassVar[bool] = True

    def __init__(self, trial: Any, monitor: str) -> None:
        require_package("optuna", "OptunaPruning", "tune")
        if trial is not None and not (hasattr(trial, "report") and hasattr(trial, "should_prune")):
            raise MisconfigurationException(
                f"OptunaPruning(trial={trial!r}): it must be the trial that the study gives to its objective."
            )
        self.trial = trial
        self.monitor = monitor
        self.pruned = False
        """Whether the study's pruner has ended the run."""
        self._metric = MonitoredMetric(monitor, "min", f"OptunaPruning(monitor={monitor!r})")
        self._reported: list[float] = []

    @property
    def state_key(self) -> str:
        """The class and the metric."""
        return self._generate_state_key(monitor=self.monitor)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run whose rank 0 has no trial."""
        self.raised_after_fit = None
        if stage != "fit":
            return
        self._metric.start()
        if self.trial is None and trainer.is_global_zero:
            raise MisconfigurationException("OptunaPruning(trial=None): rank 0 needs the trial; other ranks do not.")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report a metric name that looks misspelled, before training begins."""
        self._metric.after_sanity_check(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the metric."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._metric.validated = True
        self._report(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the metric, where there is no validation."""
        self._metric.epoch_ended = True
        if not trainer.enable_validation:
            self._report(trainer)
        elif not self._reported and self._metric.overdue(trainer):
            self._refuse_missing(trainer)

    def _report(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        current = self._metric.read(trainer.strategy, trainer.callback_metrics)
        if current is None:
            if self._metric.overdue(trainer):
                self._refuse_missing(trainer)
            return
        step, value = len(self._reported), float(current)
        self._reported.append(value)

        def decide() -> bool:
            _tell(self.trial, step, value)
            return bool(self.trial.should_prune())

        if on_rank_zero(trainer.strategy, decide, "could not report to the trial") and not self.pruned:
            self._prune()
            trainer.should_stop = True
            rank_zero_info(f"The trial is pruned: {self.monitor} = {value:g} at step {step}.")

    def _prune(self) -> None:
        from optuna import TrialPruned  # an extra, and heavy

        self.pruned = True
        value = self._reported[-1] if self._reported else float("nan")
        self.raised_after_fit = TrialPruned(f"Pruned at step {len(self._reported) - 1}: {self.monitor} = {value:g}.")

    def _refuse_missing(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:
            raise MisconfigurationException(
                f"{self._metric.missing(trainer.callback_metrics)} Log it, or monitor another."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what was reported, and whether the run was pruned."""
        return {"reported": list(self._reported), "pruned": self.pruned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what was reported; a trial that does not know of it, learns of it."""
        self._reported = list(state_dict["reported"])
        if self.trial is not None:
            for step, value in enumerate(self._reported):
                _tell(self.trial, step, value)
        self.pruned, self.raised_after_fit = False, None
        if state_dict["pruned"]:
            self._prune()


def _tell(trial: Any, step: int, value: float) -> None:
    """Report a value, unless the trial has one for this step: that of the run that was killed after it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The reported value is ignored")
        trial.report(value, step)
