"""What the Trainer keeps of a learning-rate scheduler that ``configure_optimizers`` returned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from treadle_fabric import LRScheduler

__all__ = ["LRSchedulerConfig"]


@dataclass(slots=True)
class LRSchedulerConfig:
    """A learning-rate scheduler and when it steps."""

    scheduler: LRScheduler | Any
    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True
