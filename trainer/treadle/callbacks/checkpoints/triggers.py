"""When ModelCheckpoint saves: at steps, at epochs, or after a span of time."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

from treadle.callbacks.monitoring.monitored_metric import decides_at_epoch_end
from treadle_fabric import Fabric, MisconfigurationException, check_integer
from treadle_fabric.coordination import StepClock

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = ["SaveTriggers"]


class SaveTriggers:
    """The one of three triggers that was chosen, and when it fires next.

    Args:
        every_n_train_steps: fire whenever that many optimizer steps have been made. None or 0: not at steps.
        every_n_epochs: fire at each n-th epoch. None: 1 where neither steps nor a time are given, else 0, which fires
            at no epoch.
        train_time_interval: fire at the end of the first batch after that much time. None: not by time.
        at_epoch_end: whether an epoch is due at the end of training in it (True) or of validation (False). None: see
            :func:`decides_at_epoch_end`.

    Raises:
        MisconfigurationException: an argument is of a wrong type or negative, or several triggers are given.
    """

    def __init__(
        self,
        every_n_train_steps: int | None,
        every_n_epochs: int | None,
        train_time_interval: timedelta | None,
        at_epoch_end: bool | None,
    ) -> None:
        if every_n_epochs is None:
            every_n_epochs = 1 if every_n_train_steps is None and train_time_interval is None else 0
        steps = check_integer("ModelCheckpoint: every_n_train_steps", every_n_train_steps or 0, minimum=0)
        epochs = check_integer("ModelCheckpoint: every_n_epochs", every_n_epochs, minimum=0)
        if train_time_interval is not None and not isinstance(train_time_interval, timedelta):
            raise MisconfigurationException(
                f"ModelCheckpoint(train_time_interval={train_time_interval!r}) must be a `datetime.timedelta`."
            )
        if sum((steps > 0, epochs > 0, train_time_interval is not None)) > 1:
            raise MisconfigurationException(
                f"ModelCheckpoint(every_n_train_steps={steps}, every_n_epochs={epochs}, "
                f"train_time_interval={train_time_interval}): only one of the three can be given; use a callback for "
                "each."
            )
        self.every_n_train_steps = steps
        self.every_n_epochs = epochs
        self.train_time_interval = train_time_interval
        self._at_epoch_end = at_epoch_end
        self.in_epoch = steps > 0 or train_time_interval is not None
        self._next_step = 0
        self._next_time = 0.0
        self._clock: StepClock | None = None

    def start(self, fabric: Fabric, step: int) -> None:
        """Begin to count steps and time; ``step`` is the number of optimizer steps made so far."""
        self._clock = None if self.train_time_interval is None else StepClock(fabric)
        self._plan(step)

    def fires(self, step: int) -> bool:
        """Tell after a training batch, alike on every rank, whether a save is due, and plan the next one if so."""
        if self._clock is None:
            due = step >= self._next_step
        else:
            due = self._clock.over(self._next_time - time.monotonic())
        if due:
            self._plan(step)
        return due

    def epoch_is_due(self, trainer: Trainer, at_epoch_end: bool) -> bool:
        """Tell whether a save of the current epoch is due, at the end of training in it or else of validation."""
        due = self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return due and decides_at_epoch_end(trainer, self._at_epoch_end) == at_epoch_end

    def _plan(self, step: int) -> None:
        if self.every_n_train_steps:
            self._next_step = (step // self.every_n_train_steps + 1) * self.every_n_train_steps
        if self.train_time_interval is not None:
            self._next_time = time.monotonic() + self.train_time_interval.total_seconds()
