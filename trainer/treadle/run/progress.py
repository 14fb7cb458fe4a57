"""The counters of a run: epochs, batches and steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from treadle.run.accumulation import Accumulation

__all__ = ["FitProgress", "Phase"]


class Phase(IntEnum):
    """What is still to do at the end of a training batch."""

    BETWEEN = 0
    """Nothing: the next batch comes."""
    BATCH_END = 1
    """In ``on_train_batch_end``: loggers, validation and plateau schedulers follow."""
    LOGGED = 2
    """Validation, where due, and plateau schedulers follow."""
    VALIDATED = 3
    """Plateau schedulers follow."""


@dataclass(slots=True)
class FitProgress:
    """How far a fit has come. A checkpoint keeps all of it; ``epoch`` and ``step`` are what users see as
    ``current_epoch`` and ``global_step``.
    """

    epoch: int = 0
    """Completed epochs."""
    batch: int = 0
    """Batches trained on in this epoch."""
    begun: bool = False
    """Whether the first batch of this epoch was drawn."""
    batches: int = 0
    """Batches trained on in all epochs."""
    differentiated: int = 0
    """Batches in all epochs whose backward pass has begun, in automatic optimization: one more than :attr:`batches`
    where the gradients already have a part of the current batch, or all of it."""
    step: int = 0
    """Batches at which an optimizer stepped, in all epochs, and steps made between two batches."""
    step_in_epoch: int = 0
    logging_step: int = 0
    """Batches that ended an accumulation. The loggers' x axis is this number minus one."""
    optimizer_steps: int = 0
    """Steps of all optimizers, each counted; more than ``step`` where several optimizers step at a batch."""
    scheduler_steps: int = 0
    scheduler_steps_in_epoch: int = 0
    is_last_batch: bool = False
    """Whether the current batch is known to be the epoch's last; where a stream ends, that is known after it."""
    stepping: bool = True
    """Whether the current batch ends an accumulation."""
    stepped: bool = False
    """Whether an optimizer stepped at the current batch or, between two batches, since the last one."""
    accumulation: Accumulation = field(default_factory=Accumulation)
    """How the batches of this epoch are divided into accumulations."""
    validation_due: bool = False
    """Whether validation follows the current batch."""
    phase: Phase = Phase.BETWEEN
    """How far the end of the current batch has come; a run resumed from a checkpoint saved now goes on there."""
    epoch_ended: bool = False
    """Whether the epoch is in its end hooks; a run resumed from a checkpoint saved now begins the next epoch."""

    @property
    def within_batch(self) -> bool:
        """Whether the current batch may still be trained on, because nothing that follows it has begun."""
        return self.phase is Phase.BETWEEN and not self.epoch_ended

    @property
    def within_backward(self) -> bool:
        """Whether the gradients are neither those before the current batch nor those after it has been trained on."""
        return self.differentiated > self.batches

    def settle(self) -> None:
        """Turn the counters of a state that was saved or left into those with which a run goes on from it."""
        self.begun |= self.batch > 0  # in checkpoints that do not tell
        self.differentiated = 0
        self.stepped &= self.phase is not Phase.BETWEEN
        self.is_last_batch &= not self.within_batch
        if self.epoch_ended:
            self.epoch += 1
            self.begin_epoch()

    def begin_epoch(self) -> None:
        """Reset the counters of the epoch."""
        self.batch = self.step_in_epoch = self.scheduler_steps_in_epoch = 0
        self.begun = self.is_last_batch = self.validation_due = self.epoch_ended = self.stepped = False
        self.phase, self.accumulation = Phase.BETWEEN, Accumulation()

    def settle_steps(self, optimizer_steps: int) -> None:
        """Count one step where torch reported none or several.

        Torch reports none where a gradient scaler leaves the step out, and where an engine steps in its own way; it
        reports several where an optimizer's class calls the step of its base class.

        Args:
            optimizer_steps: the number of optimizer steps with the one that was just made.
        """
        self.optimizer_steps = optimizer_steps
        if not self.stepped:
            self.stepped = True
            self.step += 1
            self.step_in_epoch += 1
