"""EarlyStopping: ends training when a metric stops improving."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch import Tensor

from treadle.callbacks.callback import Callback
from treadle.callbacks.monitoring.monitored_metric import MonitoredMetric, decides_at_epoch_end, worst_value
from treadle_fabric import (
    MissingMetricError,
    check_integer,
    rank_prefixed_message,
    rank_zero_info,
    rank_zero_warn,
)

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["EarlyStopping", "EarlyStoppingReason"]


_THRESHOLDS: Final = ("stopping_threshold", "divergence_threshold")


class EarlyStoppingReason(IntEnum):
    """Why :class:`EarlyStopping` ended training."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """End training when a logged metric has stopped improving, passed a threshold, or is not finite any more.

    With several processes rank 0's value counts for all, so that all ranks stop together.

    Args:
        monitor: the logged metric.
        min_delta: the least change that counts as an improvement; the sign of the number is ignored.
        patience: the number of checks without improvement that ends training (checks, not epochs: validation may run
            less often).
        verbose: print each improvement.
        mode: whether "min" or "max" is better.
        strict: a metric that was never logged is an error. False: a warning, and no check.
        check_finite: stop at NaN and infinity.
        stopping_threshold: stop once the metric is better than this.
        divergence_threshold: stop once the metric is worse than this.
        check_on_train_epoch_end: check at the end of the training epoch (True) or of validation (False). Default: at
            the end of the training epoch where validation runs once, at its end, or not at all.
        log_rank_zero_only: print on rank 0 alone. Otherwise every rank prints, with its number.

    Raises:
        MisconfigurationException: ``mode`` is unknown, or ``patience`` is no integer or negative; and in training,
            when every hook that logs has run without logging ``monitor``.
    """

    monitors: ClassVar[bool] = True
    mode_dict: ClassVar[dict[str, Callable[[Any, Any], Tensor]]] = {"min": torch.lt, "max": torch.gt}
    order_dict: ClassVar[dict[str, str]] = {"min": "<", "max": ">"}

    wait_count: int = 0
    """The number of checks since the last improvement."""
    stopped_epoch: int = 0
    """The epoch that was the last, counted from 0; 0 also while training was not ended."""
    stopping_reason: EarlyStoppingReason = EarlyStoppingReason.NOT_STOPPED
    """Why training was ended."""
    stopping_reason_message: str | None = None
    """The same as a sentence; None while training was not ended."""

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        super().__init__()
        self._metric = MonitoredMetric(monitor, mode, f"EarlyStopping(monitor={monitor!r})")
        self.monitor = monitor
        self.patience = check_integer("EarlyStopping: patience", patience, minimum=0)
        self.verbose = verbose
        self.mode = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        self.min_delta = abs(min_delta) if mode == "max" else -abs(min_delta)
        self.best_score = torch.tensor(worst_value(mode), device="cpu")
        self._check_on_train_epoch_end = check_on_train_epoch_end
        self._given_patience = self.patience  # a saved state has its own
        self._stopped_by: dict[str, float | None] = dict.fromkeys(_THRESHOLDS)

    @property
    def state_key(self) -> str:
        """The class, the metric and the mode."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def monitor_op(self) -> Callable[[Any, Any], Tensor]:
        """``torch.lt`` or ``torch.gt``: whether the first value is better than the second."""
        return self.mode_dict[self.mode]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a fit: no hook that may log the metric has run yet."""
        if stage == "fit":
            self._metric.start()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report a metric name that looks misspelled, before training begins."""
        self._metric.after_sanity_check(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the metric, where validation decides."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._metric.validated = True
        if not decides_at_epoch_end(trainer, self._check_on_train_epoch_end):
            self._run_early_stopping_check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the metric, where the end of the training epoch decides."""
        self._metric.epoch_ended = True
        if decides_at_epoch_end(trainer, self._check_on_train_epoch_end):
            self._run_early_stopping_check(trainer)

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        """Check the metric now; a subclass may call this in hooks of its own."""
        if trainer.fast_dev_run:
            return
        metrics = trainer.callback_metrics
        current = self._metric.read(trainer.strategy, metrics)
        if current is None:
            if self._metric.overdue(trainer):
                if self.strict:
                    raise MissingMetricError(
                        f"{_missing(self._metric, metrics)} Log it, monitor another, or pass strict=False."
                    )
                if self._metric.first_missing():
                    rank_zero_warn(
                        f"{_missing(self._metric, metrics)} Early stopping does nothing without it.",
                        category=RuntimeWarning,
                    )
            return
        reason, message = self._judge(current)
        if reason:
            told = trainer.should_stop and reason == self.stopping_reason  # and min_epochs, say, is not reached yet
            message = "" if told else f"{message} Signaling Trainer to stop."
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason = reason
            self.stopping_reason_message = message or self.stopping_reason_message
        if message and (reason or self.verbose):
            self._print(trainer, message)

    def _judge(self, current: Tensor) -> tuple[EarlyStoppingReason, str]:
        """Return why to stop, if that is so, and what to print; count the checks without improvement."""
        better, name, value = self.monitor_op, self.monitor, float(current)
        reasons = EarlyStoppingReason
        sign = self.order_dict[self.mode]
        opposite = self.order_dict["max" if self.mode == "min" else "min"]
        if self.check_finite and not torch.isfinite(current):
            return reasons.NON_FINITE_METRIC, (
                f"Monitored metric {name} = {value} is not finite. Previous best value was {self.best_score:.3f}."
            )
        if self.stopping_threshold is not None and better(current, self.stopping_threshold):
            return reasons.STOPPING_THRESHOLD, (
                f"Stopping threshold reached: {name} = {value} {sign} {self.stopping_threshold}."
            )
        if self.divergence_threshold is not None and better(-current, -self.divergence_threshold):
            return reasons.DIVERGENCE_THRESHOLD, (
                f"Divergence threshold reached: {name} = {value} {opposite} {self.divergence_threshold}."
            )
        if better(current - self.min_delta, self.best_score):
            gain = abs(float(self.best_score) - value)
            by = f" by {gain:.3f} >= min_delta = {abs(self.min_delta)}" if torch.isfinite(self.best_score) else ""
            self.best_score = current
            self.wait_count = 0
            return reasons.NOT_STOPPED, f"Metric {name} improved{by}. New best score: {value:.3f}"
        self.wait_count += 1
        if self.wait_count < self.patience:
            return reasons.NOT_STOPPED, ""
        return reasons.PATIENCE_EXHAUSTED, (
            f"Monitored metric {name} did not improve in the last {self.wait_count} records. "
            f"Best score: {self.best_score:.3f}."
        )

    def _print(self, trainer: Trainer, message: str) -> None:
        if self.log_rank_zero_only or trainer.world_size == 1:
            rank_zero_info(message)
        else:
            logging.getLogger("treadle_fabric").info(rank_prefixed_message(message, trainer.global_rank))

    def state_dict(self) -> dict[str, Any]:
        """Return the best score, the checks since, and what decides; the keys are Lightning's and given thresholds."""
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
            "stopping_reason": int(self.stopping_reason),
            "stopping_reason_message": self.stopping_reason_message,
        } | {name: value for name in _THRESHOLDS if (value := getattr(self, name)) is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back the best score, the number of checks since, and the patience."""
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict.get("stopped_epoch", 0)
        self.best_score = torch.as_tensor(state_dict.get("best_score", self.best_score), device="cpu")
        self.patience = state_dict.get("patience", self.patience)
        self.stopping_reason = EarlyStoppingReason(state_dict.get("stopping_reason", 0))
        self.stopping_reason_message = state_dict.get("stopping_reason_message")
        self._stopped_by = {name: state_dict.get(name) for name in _THRESHOLDS}

    def confirm_stop(self) -> bool:
        """Return whether the arguments are still those for which training was ended; else it is not ended any more."""
        reason, reasons = self.stopping_reason, EarlyStoppingReason
        if reason is reasons.PATIENCE_EXHAUSTED:
            goes_on = self._given_patience > self.wait_count
        elif reason is reasons.NON_FINITE_METRIC:
            goes_on = not self.check_finite
        else:
            name = _THRESHOLDS[reason is reasons.DIVERGENCE_THRESHOLD]
            goes_on = reason is reasons.NOT_STOPPED or getattr(self, name) != self._stopped_by[name]
        if goes_on and reason is not reasons.NOT_STOPPED:
            self.patience, self.stopped_epoch = self._given_patience, 0
            self.stopping_reason, self.stopping_reason_message = reasons.NOT_STOPPED, None
        return not goes_on


def _missing(metric: MonitoredMetric, metrics: Mapping[str, Any]) -> str:
    return f"Early stopping conditioned on metric `{metric.name}` which is not available: {metric.unlogged(metrics)}"
