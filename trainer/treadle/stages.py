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


class RunningStage(StrEnum):
    """What is running now; validation inside fit is ``VALIDATING``."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


class TrainerStatus(StrEnum):
    """How the current run goes, or how the last one ended."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    """Ctrl-C, a signal or an error ended the run."""


@dataclass(slots=True)
class TrainerState:
    """What the trainer is doing."""

    fn: TrainerFn | None = None
    stage: RunningStage | None = None
    status: TrainerStatus = TrainerStatus.INITIALIZING

    def __reduce__(self) -> tuple[Any, ...]:  # what runs here does not run in a copy
        status = TrainerStatus.INTERRUPTED if self.status is TrainerStatus.RUNNING else self.status
        return TrainerState, (self.fn, None, status)
