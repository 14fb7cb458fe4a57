"""Timer: measures the time spent in each stage, and ends training when the time is up."""

from __future__ import annotations

import time
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from treadle.callbacks.callback import Callback
from treadle.durations import parse_duration
from treadle.stages import RunningStage
from treadle_fabric import MisconfigurationException, on_rank_zero, rank_zero_info
from treadle_fabric.coordination import StepClock

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["Interval", "Timer"]

_STAGES: Final = ("train", "sanity_check", "validate", "test", "predict")


class Interval(StrEnum):
    """When :class:`Timer` checks the time."""

    step = "step"
    epoch = "epoch"


class Timer(Callback):
    """Measure the time spent in each stage, and end training when the time is up. Checkpoints keep the time spent.

    With several processes rank 0's clock counts, so that all ranks stop at the same step.

    Args:
        duration: the time for training, with the validation in between: "DD:HH:MM:SS", a timedelta, or a dictionary
            of the arguments of a timedelta. None: only measure.
        interval: check the time after each "step" or "epoch".
        verbose: print a line when the time is up.

    Raises:
        MisconfigurationException: ``duration`` is no duration, or ``interval`` is neither "step" nor "epoch".
    """

    def __init__(
        self,
        duration: str | timedelta | dict[str, int] | None = None,
        interval: Interval | str = Interval.step,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        if interval not in tuple(Interval):
            raise MisconfigurationException(f"Timer(interval={interval!r}): it must be 'step' or 'epoch'.")
        parsed = parse_duration(duration, "Timer(duration)")
        self._duration = None if parsed is None else parsed.total_seconds()
        self._interval = Interval(interval)
        self._verbose = verbose
        self._checks_steps = self._duration is not None and self._interval is Interval.step
        self._start_time: dict[str, float] = {}
        self._end_time: dict[str, float] = {}
        self._spent = dict.fromkeys(_STAGES, 0.0)  # seconds in ended runs of a stage, earlier processes included
        self._clock: StepClock | None = None

    def __getstate__(self) -> dict[str, Any]:
        now = time.monotonic()  # the stages that run do not run in a copy, and another machine has another clock
        spent = {stage: self.time_elapsed(stage) for stage in self._spent}
        ended = {**dict.fromkeys(self._start_time, now), **self._end_time}
        return {**self.__dict__, "_spent": spent, "_end_time": ended, "_clock": None}

    def start_time(self, stage: str = RunningStage.TRAINING) -> float | None:
        """Return when a stage last began, on the clock of :func:`time.monotonic`; None if it never did."""
        return self._start_time.get(_stage(stage))

    def end_time(self, stage: str = RunningStage.TRAINING) -> float | None:
        """Return when a stage last ended, on the clock of :func:`time.monotonic`; None if it has not ended."""
        return self._end_time.get(_stage(stage))

    def time_elapsed(self, stage: str = RunningStage.TRAINING) -> float:
        """Return the seconds spent in a stage so far, those before a resume included."""
        stage = _stage(stage)
        start = self._start_time.get(stage)
        running = start is not None and stage not in self._end_time
        return self._spent[stage] + (time.monotonic() - start if running and start is not None else 0.0)

    def time_remaining(self, stage: str = RunningStage.TRAINING) -> float | None:
        """Return the seconds that are left for a stage; None without a duration."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    def _begin(self, stage: str) -> None:
        self._start_time[stage] = time.monotonic()
        self._end_time.pop(stage, None)

    def _end(self, stage: str) -> None:
        if stage in self._start_time and stage not in self._end_time:
            now = self._end_time[stage] = time.monotonic()
            self._spent[stage] += now - self._start_time[stage]

    def on_fit_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Check the time: after a resume it may be up before training begins."""
        self._clock = StepClock(trainer.fabric)
        self._check(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure training."""
        self._begin("train")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End measuring training."""
        self._end("train")

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure the sanity check."""
        self._begin("sanity_check")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End measuring the sanity check."""
        self._end("sanity_check")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure validation; the sanity check does not count as one."""
        if not trainer.sanity_checking:
            self._begin("validate")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End measuring validation."""
        self._end("validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure testing."""
        self._begin("test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End measuring testing."""
        self._end("test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure prediction."""
        self._begin("predict")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End measuring prediction."""
        self._end("predict")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the time, with interval "step"."""
        if self._checks_steps and self._clock is not None and not trainer.should_stop:
            remaining = self.time_remaining()
            if remaining is not None and self._clock.over(remaining):
                self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Check the time, with interval "epoch"."""
        if self._interval is Interval.epoch and not trainer.should_stop:
            self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        remaining = self.time_remaining()
        if remaining is not None and on_rank_zero(trainer.strategy, lambda: remaining <= 0, "could not tell the time"):
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        trainer.should_stop = True
        if self._verbose:
            spent = timedelta(seconds=int(self.time_elapsed()))
            rank_zero_info(f"Time limit reached. Elapsed time is {spent}. Signaling Trainer to stop.")

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds spent in each stage."""
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from the seconds that were spent before."""
        self._spent.update(state_dict.get("time_elapsed", {}))


def _stage(stage: str) -> str:
    name = str(getattr(stage, "value", stage))
    if name not in _STAGES:
        raise MisconfigurationException(f"Timer knows no stage {name!r}: it must be one of {', '.join(_STAGES)}.")
    return name
