"""The metric that a callback decides by, and the hook at which it decides."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treadle_fabric import MisconfigurationException, Strategy, near_names, on_rank_zero, rank_zero_warn

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = ["MonitoredMetric", "decides_at_epoch_end", "worst_value"]


def worst_value(mode: str) -> float:
    """Return the value that every other value is better than: infinity for "min", its negative for "max"."""
    return float("inf") if mode == "min" else float("-inf")


def decides_at_epoch_end(trainer: Trainer, chosen: bool | None) -> bool:
    """Tell whether a callback decides at the end of the training epoch, rather than at the end of validation.

    Args:
        trainer: the trainer of the run.
        chosen: what the user asked for. None: the end of the training epoch, where validation runs once an epoch, at
            its end, or does not run at all.
    """
    if chosen is not None:
        return chosen
    if not trainer.enable_validation:
        return True
    interval = trainer.val_check_interval
    # an int counts batches: 1 is "after every batch", and only the fraction 1.0 is "at the end"
    return trainer.check_val_every_n_epoch == 1 and isinstance(interval, float) and interval == 1.0


class MonitoredMetric:
    """A logged metric that a callback decides by, and whether it may still be logged.

    Args:
        name: the name under which the metric is logged.
        mode: "min" or "max", whichever is better.
        owner: what messages call the callback that monitors the metric.

    Raises:
        MisconfigurationException: ``name`` is no text, or ``mode`` is neither "min" nor "max".
    """

    def __init__(self, name: str, mode: str, owner: str) -> None:
        if not isinstance(name, str):
            raise MisconfigurationException(f"{owner}: the monitored metric must be a name under which one is logged.")
        if mode not in ("min", "max"):
            raise MisconfigurationException(f"{owner} got mode={mode!r}: it must be 'min' or 'max'.")
        self.name = name
        self.owner = owner
        self.start()

    def start(self) -> None:
        """Begin a fit: no hook that may log the metric has run yet."""
        self.validated = self.epoch_ended = self._told_missing = False

    def read(self, strategy: Strategy, metrics: Mapping[str, Any]) -> Tensor | None:
        """Return rank 0's value as a scalar on the CPU, on every rank; None where rank 0 has none.

        This is the one place that waits for the device.
        """

        def value() -> Tensor | None:
            found = metrics.get(self.name)
            if found is None:
                return None
            found = found if isinstance(found, Tensor) else torch.tensor(found, device="cpu")
            return found.detach().cpu().reshape(())

        return on_rank_zero(strategy, value, f"could not read the metric {self.name!r}")

    def overdue(self, trainer: Trainer) -> bool:
        """Tell whether every hook that may log the metric has run, so that a missing metric will never come."""
        return self.epoch_ended and (self.validated or not trainer.enable_validation)

    def first_missing(self) -> bool:
        """Return whether this fit asks for the first time; for a warning that is given once."""
        first, self._told_missing = not self._told_missing, True
        return first

    def missing(self, metrics: Mapping[str, Any]) -> str:
        """Return the message for a metric that was not logged."""
        return f"{self.owner}: {self.unlogged(metrics)}"

    def unlogged(self, metrics: Mapping[str, Any]) -> str:
        """Return the end of such a message, with similar names."""
        return f"nothing has logged {self.name!r}. {near_names(self.name, metrics)}"

    def after_sanity_check(self, logged: Mapping[str, Any]) -> None:
        """Warn, before training, of a name that looks like a misspelling of one that validation logged."""
        close = difflib.get_close_matches(self.name, logged, n=1, cutoff=0.85)
        # training may still log the metric, so this is no error, and a name that is not very near is no reason to warn
        if close and self.name not in logged:
            rank_zero_warn(
                f"{self.owner}: the validation sanity check logged {close[0]!r}, not {self.name!r}. If training does "
                "not log it either, the run will stop when the value is needed."
            )
