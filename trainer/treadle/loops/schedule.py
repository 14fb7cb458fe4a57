"""When a run validates and when it ends, computed from the arguments by pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from treadle.durations import parse_duration
from treadle_fabric import MisconfigurationException, check_integer, rank_zero_warn

__all__ = ["Durations", "ValidationSchedule", "change_durations", "resolve_durations", "total_steps"]


@dataclass(frozen=True, slots=True)
class Durations:
    """How long to train. ``max_epochs`` and ``max_steps`` are -1 where there is no bound."""

    max_epochs: int
    max_steps: int
    min_epochs: int | None
    min_steps: int | None
    max_time: timedelta | None
    max_epochs_assumed: bool = False
    """Whether ``max_epochs`` is the default, because no limit was given."""


def resolve_durations(
    max_epochs: int | None, min_epochs: int | None, max_steps: int, min_steps: int | None, max_time: Any
) -> Durations:
    """Check the duration arguments and fill in the defaults: 1000 epochs where nothing bounds the run."""
    time = parse_duration(max_time, "max_time")
    if max_epochs is not None:
        max_epochs = check_integer("max_epochs", max_epochs, minimum=-1, meaning="-1 for no bound")
    max_steps = check_integer("max_steps", max_steps, minimum=-1, meaning="-1 for no bound")
    min_epochs = None if min_epochs is None else check_integer("min_epochs", min_epochs, minimum=0)
    min_steps = None if min_steps is None else check_integer("min_steps", min_steps, minimum=0)
    assumed = max_epochs is None and max_steps == -1 and time is None
    if max_epochs is None:
        max_epochs = 1000 if assumed else -1
    if min_epochs is not None and max_epochs != -1 and min_epochs > max_epochs:
        rank_zero_warn(f"min_epochs={min_epochs} is more than max_epochs={max_epochs}, where training ends: lower it.")
    if min_steps is not None and max_steps != -1 and min_steps > max_steps:
        rank_zero_warn(f"min_steps={min_steps} is more than max_steps={max_steps}, where training ends: lower it.")
    return Durations(max_epochs, max_steps, min_epochs, min_steps, time, assumed)


def change_durations(durations: Durations, **changes: Any) -> Durations:
    """Check the durations with some of them changed, by name; the run's time stays as it is."""
    given = {name: getattr(durations, name) for name in ("max_epochs", "min_epochs", "max_steps", "min_steps")}
    return replace(resolve_durations(**{**given, **changes}, max_time=durations.max_time), max_epochs_assumed=False)


def check_limit(value: Any, name: str) -> None:
    """Refuse a ``limit_*_batches`` that is neither a count nor a fraction."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or value < 0
        or (isinstance(value, float) and value > 1)
    ):
        raise MisconfigurationException(
            f"{name}={value!r} must be a number of batches (an int of at least 0) or a fraction (a float from 0.0 to"
            " 1.0)."
        )


def total_steps(durations: Durations, batches: float, accumulate: int) -> float:
    """Return the optimizer steps of a fit with ``batches`` batches per epoch; infinity where nothing bounds them."""
    bound = math.inf if durations.max_steps == -1 else durations.max_steps
    if durations.max_epochs == -1:
        return bound
    if batches == math.inf and durations.max_epochs:
        return bound
    return min(math.ceil(batches / accumulate) * durations.max_epochs, bound)


@dataclass(frozen=True, slots=True)
class ValidationSchedule:
    """When validation runs in fit."""

    every_n_batches: float
    """The batches between two validations. Infinity: only at the end of an epoch of unknown length, or by time."""
    every_n_epochs: int | None
    """The epochs between two validations. None: batches are counted across epochs."""
    every: timedelta | None = None
    """The time between two validations. None: batches decide."""
    at_epoch_end: bool = False
    """Whether validation follows the epoch's last batch, whatever the number of batches."""

    @classmethod
    def resolve(cls, interval: Any, every_n_epochs: int | None, num_batches: float) -> ValidationSchedule:
        """Compute the schedule from the Trainer's arguments and the number of training batches.

        Args:
            interval: ``val_check_interval``.
            every_n_epochs: ``check_val_every_n_epoch``.
            num_batches: the training batches of an epoch; infinity where that is not known.

        Raises:
            MisconfigurationException: validation would never run, or a fraction is asked of an unknown length.
        """
        if isinstance(interval, (str, Mapping, timedelta)):
            return cls(math.inf, every_n_epochs, parse_duration(interval, "val_check_interval"))
        if isinstance(interval, int):
            if every_n_epochs is not None and interval > num_batches:
                raise MisconfigurationException(
                    f"val_check_interval={interval} is more than the {num_batches} training batches of an epoch, so"
                    " validation would never run: lower it, or set check_val_every_n_epoch=None to count batches"
                    " across epochs."
                )
            return cls(interval, every_n_epochs)
        if num_batches == math.inf:
            if interval != 1.0:
                raise MisconfigurationException(
                    f"val_check_interval={interval} is a fraction of a training loader whose length is unknown: give a"
                    " number of batches (an int)."
                )
            return cls(math.inf, every_n_epochs)
        return cls(max(1, int(num_batches * interval)), every_n_epochs, at_epoch_end=interval == 1.0)

    def in_epoch(self, epoch: int) -> bool:
        """Return whether validation runs at all in the epoch after ``epoch`` completed epochs."""
        return self.every_n_epochs is None or (epoch + 1) % self.every_n_epochs == 0

    def due_at_end(self, epoch: int) -> bool:
        """Return whether validation follows the last batch of an epoch because it is the last one."""
        return self.in_epoch(epoch) and self.every is None and (self.at_epoch_end or self.every_n_batches == math.inf)

    def due(self, epoch: int, batch: int, batches: int, *, is_last: bool) -> bool:
        """Return whether validation follows the batch that was just trained on, where batches decide and not time.

        Args:
            epoch: completed epochs.
            batch: batches of this epoch so far, this one included.
            batches: batches of all epochs so far, this one included.
            is_last: whether the batch is the epoch's last.
        """
        if not self.in_epoch(epoch):
            return False
        if self.at_epoch_end or self.every_n_batches == math.inf:
            return is_last
        count = batches if self.every_n_epochs is None else batch
        return count % self.every_n_batches == 0


def check_validation_arguments(interval: Any, every_n_epochs: Any) -> None:
    """Refuse impossible ``val_check_interval`` and ``check_val_every_n_epoch`` before anything starts."""
    if isinstance(interval, (str, Mapping, timedelta)):
        if (parse_duration(interval, "val_check_interval") or timedelta(0)) <= timedelta(0):
            raise MisconfigurationException(f"val_check_interval={interval!r} must be longer than no time at all.")
    elif isinstance(interval, bool) or not isinstance(interval, (int, float)):
        raise MisconfigurationException(
            f"val_check_interval={interval!r} must be an int (batches), a float (fraction of an epoch) or a duration."
        )
    elif (isinstance(interval, int) and interval < 1) or (isinstance(interval, float) and not 0.0 < interval <= 1.0):
        raise MisconfigurationException(
            f"val_check_interval={interval!r} must be at least 1 batch, or a fraction above 0.0 and up to 1.0."
        )
    if every_n_epochs is None:
        if isinstance(interval, float):
            raise MisconfigurationException(
                f"check_val_every_n_epoch=None counts batches across epochs, so val_check_interval={interval!r} must be"
                " an int or a duration."
            )
    else:
        check_integer("check_val_every_n_epoch", every_n_epochs, minimum=1, meaning="or None: by batches alone")
