"""The metric that a callback decides by, and what is decided or timed alike on every rank."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from treadle_fabric.errors import CheckpointError, MisconfigurationException, near_names
from treadle_fabric.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from treadle.trainer import Trainer

__all__ = ["MonitoredMetric", "from_rank_zero", "validates_at_epoch_end"]

T = TypeVar("T")


def from_rank_zero(trainer: Trainer, function: Callable[[], T]) -> T:
    """What ``function`` returns on rank 0, on every rank; the others do not call it.

    Raises:
        CheckpointError: on every rank, where ``function`` raised it, or an OSError, on rank 0. So all go on, or none.
    """
    if trainer.world_size == 1:
        return function()
    found: T | None = None
    error: CheckpointError | OSError | None = None
    if trainer.is_global_zero:
        try:
            found = function()
        except (CheckpointError, OSError) as e:
            error = e
    found, trouble = trainer.strategy.broadcast((found, None if error is None else str(error)))
    if trouble is not None:
        raise error or CheckpointError(f"Rank 0: {trouble}")
    return cast("T", found)


def validates_at_epoch_end(trainer: Trainer) -> bool:
    """Whether decisions belong to the end of a training epoch: validation runs at its end alone, or not at all."""
    if not trainer.enable_validation:
        return True
    interval = trainer.val_check_interval
    # an int counts batches: 1 is "after every batch", and only the fraction 1.0 is "at the end"
    return trainer.check_val_every_n_epoch == 1 and isinstance(interval, float) and interval == 1.0


class MonitoredMetric:
    """A logged metric and the direction that is better.

    Args:
        name: as it was logged.
        mode: "min" or "max".
        owner: how messages call the callback that monitors it.

    Raises:
        MisconfigurationException: for another mode.
    """

    def __init__(self, name: str, mode: str, owner: str) -> None:
        if mode not in ("min", "max"):
            raise MisconfigurationException(f"{owner} got mode={mode!r}; it is 'min' or 'max'.")
        self.name = name
        self.owner = owner
        self.better: Callable[[Any, Any], Tensor] = torch.lt if mode == "min" else torch.gt
        self.worst = float("inf") if mode == "min" else float("-inf")
        self.validated = False
        self.epoch_ended = False

    def start(self) -> None:
        """A fit begins: nothing has had its chance to log yet."""
        self.validated = self.epoch_ended = False

    def read(self, trainer: Trainer, metrics: Mapping[str, Any]) -> Tensor | None:
        """Rank 0's value in ``metrics`` as a scalar on the CPU: the one place that waits for the device."""

        def value() -> Tensor | None:
            found = metrics.get(self.name)
            if found is None:
                return None
            return found.detach().cpu().reshape(()) if isinstance(found, Tensor) else torch.tensor(found)

        return from_rank_zero(trainer, value)

    def overdue(self, trainer: Trainer) -> bool:
        """Whether every hook that logs has run, so that a metric that is still missing will never come."""
        return self.epoch_ended and (self.validated or not trainer.enable_validation)

    def missing(self, metrics: Mapping[str, Any]) -> str:
        """The message for a metric that was not logged."""
        return f"{self.owner}: nothing has logged {self.name!r}. {near_names(self.name, metrics)}"

    def after_sanity_check(self, trainer: Trainer) -> None:
        """Warn before training of a name that looks like a misspelling of one that validation logged."""
        known = trainer.callback_metrics
        close = difflib.get_close_matches(self.name, known, n=1, cutoff=0.85)
        # training may still log it, so this is no error; a name that is not very near is no reason to speak
        if close and self.name not in known:
            rank_zero_warn(
                f"{self.owner}: the validation sanity check logged {close[0]!r}, not {self.name!r}. If training does "
                "not log it either, the run will stop when the value is needed."
            )
