"""When learning-rate schedulers step."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.optim.lr_scheduler import CyclicLR, LambdaLR, MultiplicativeLR

from treadle.module import LightningModule
from treadle.module.overriding import overrides
from treadle.run.run import Run
from treadle_fabric import MisconfigurationException, MissingMetricError, near_names, rank_zero_info, rank_zero_warn

__all__ = ["Schedulers"]

_PER_GROUP = (
    LambdaLR,
    MultiplicativeLR,
    CyclicLR,
)  # of torch 2.9 these leave out, without a word, a group that was added


class Schedulers:
    """Steps the learning-rate schedulers of a run that are due; in manual optimization none.

    Args:
        run: the run.
        validates: whether fit validates, so that validation may still log what a scheduler monitors.
    """

    def __init__(self, run: Run, *, validates: bool) -> None:
        self._validates, self._validated = validates, run.validated
        self.configs = run.schedulers if run.module.automatic_optimization else []
        self._per_group = any(isinstance(config.scheduler, _PER_GROUP) for config in self.configs)
        self._progress, self._metrics, self._first_time = run.progress, run.metrics, run.first_time
        hook: Any = run.module.lr_scheduler_step
        own = hook is None or overrides(run.module, "lr_scheduler_step", LightningModule)
        plain = run.timed(hook, "lr_scheduler_step", run.module)
        self._step = partial(run.dispatch.run, "lr_scheduler_step", hook) if own else plain

    def step(self, interval: str, count: int, *, plateau: bool = False) -> None:
        """Step the schedulers that are due.

        Args:
            interval: "step" or "epoch": what has just ended.
            count: how many of those have ended.
            plateau: whether the schedulers that monitor a metric are meant, or the others.

        Raises:
            MisconfigurationException: a monitored metric was not logged (with ``strict``), though every hook that may
                log it has run; names the near ones.
        """
        for config in self.configs:
            if config.interval != interval or config.reduce_on_plateau is not plateau or count % config.frequency:
                continue
            value = None
            if config.reduce_on_plateau and config.monitor is not None:
                found = self._metrics.callback
                value = found.get(config.monitor)
                if value is None and self._may_still_come(interval):
                    self._tell_of_waiting(config.monitor)
                    continue
                if value is None:
                    message = (
                        f"{type(config.scheduler).__name__} conditioned on metric {config.monitor} which is not"
                        f" available: nobody logged {config.monitor!r}. {near_names(config.monitor, found)}"
                    )
                    if config.strict:
                        raise MissingMetricError(f"{message} Log it, or set 'strict': False.")
                    if self._first_time(f"no {config.monitor} to step by"):
                        rank_zero_warn(f"{message} The step is skipped.", category=RuntimeWarning)
                    continue
            if self._per_group and isinstance(config.scheduler, _PER_GROUP):
                _check_groups(config.scheduler)
            try:
                self._step(config.scheduler, value)
            except (ValueError, KeyError) as error:
                _check_groups(config.scheduler, error)
                raise
            self._progress.scheduler_steps += 1
            self._progress.scheduler_steps_in_epoch += 1

    def _may_still_come(self, interval: str) -> bool:
        """Whether a hook that may log what is monitored has yet to run: that of a validation, or of an epoch's end."""
        ended = interval == "epoch" or self._progress.epoch > 0
        return not ended or (self._validates and not self._validated)

    def _tell_of_waiting(self, monitor: str) -> None:
        if self._first_time(f"waiting for {monitor}"):
            before = "first validation" if self._validates and not self._validated else "end of the first epoch"
            rank_zero_info(f"A plateau scheduler monitors {monitor!r}: before the {before} it skips its steps.")


def _check_groups(scheduler: Any, error: Exception | None = None) -> None:
    """Explain why a scheduler cannot step, where the reason is a parameter group that was added after it was made.

    Raises:
        MisconfigurationException: That is the reason.
    """
    made, optimizer = getattr(scheduler, "base_lrs", None), getattr(scheduler, "optimizer", None)
    if made is not None and optimizer is not None and len(made) != len(optimizer.param_groups):
        raise MisconfigurationException(
            f"{type(scheduler).__name__} was made for {len(made)} parameter groups, and its optimizer has"
            f" {len(optimizer.param_groups)} now. Make the groups in configure_optimizers, with parameters that are"
            " frozen so far, or use a scheduler that takes added groups, such as StepLR, ExponentialLR or"
            " CosineAnnealingLR."
        ) from error
