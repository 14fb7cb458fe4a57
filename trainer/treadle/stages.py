"""What a trainer is asked to do, what it is doing, and how its last run ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

__all__ = ["RunningStage", "TrainerFn", "TrainerState", "TrainerStatus"]


class TrainerFn(StrEnum):
    """The method that the user called."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def stage(self) -> RunningStage:
        """The stage of the method's own batches."""
        return RunningStage.TRAINING if self is TrainerFn.FITTING else RunningStage(self.value)


class RunningStage(StrEnum):
    """What is running now; validation inside fit is ``VALIDATING``."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def evaluating(self) -> bool:
        """Whether batches are evaluated: by a validation, a test or the sanity check."""
        return self in (RunningStage.VALIDATING, RunningStage.TESTING, RunningStage.SANITY_CHECKING)

    @property
    def dataloader_prefix(self) -> str:
        """The beginning of the name of the stage's dataloader method: "train", "val", "test" or "predict"."""
        return "val" if self in (RunningStage.VALIDATING, RunningStage.SANITY_CHECKING) else self.value


class TrainerStatus(StrEnum):
    """How the current run goes, or how the last one ended."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    """Ctrl-C, a signal or an error ended the run."""

    @property
    def stopped(self) -> bool:
        """Whether a run has ended, in whatever way."""
        return self in (TrainerStatus.FINISHED, TrainerStatus.INTERRUPTED)


@dataclass(slots=True)
class TrainerState:
    """What the trainer is doing."""

    status: TrainerStatus = TrainerStatus.INITIALIZING
    fn: TrainerFn | None = None
    stage: RunningStage | None = None

    @property
    def finished(self) -> bool:
        """Whether the last run came to its end."""
        return self.status is TrainerStatus.FINISHED

    @property
    def stopped(self) -> bool:
        """Whether the last run has ended, in whatever way."""
        return self.status.stopped

    def __reduce__(self) -> tuple[Any, ...]:  # what runs here does not run in a copy
        status = TrainerStatus.INTERRUPTED if self.status is TrainerStatus.RUNNING else self.status
        return TrainerState, (status, self.fn, None)
