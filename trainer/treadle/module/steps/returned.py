"""The types of what a module's methods return, under the names with which programs annotate them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, Required, TypeAlias, TypedDict

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = [
    "EVAL_DATALOADERS",
    "STEP_OUTPUT",
    "TRAIN_DATALOADERS",
    "LRSchedulerConfig",
    "LRSchedulerConfigType",
    "LRSchedulerPLType",
    "LRSchedulerTypeTuple",
    "LRSchedulerTypeUnion",
    "OptimizerConfig",
    "OptimizerLRScheduler",
    "OptimizerLRSchedulerConfig",
]

STEP_OUTPUT: TypeAlias = Tensor | Mapping[str, Any] | None
"""What a step returns: the loss, a mapping that has it as "loss", or None."""
TRAIN_DATALOADERS: TypeAlias = Any
"""What ``train_dataloader`` returns: any iterable, or containers of several."""
EVAL_DATALOADERS: TypeAlias = Any
"""What the other loader methods return: any iterable, or a list of several."""
LRSchedulerTypeUnion: TypeAlias = LRScheduler | ReduceLROnPlateau
"""torch's schedulers."""
LRSchedulerPLType: TypeAlias = LRSchedulerTypeUnion
LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
"""The same for ``isinstance``."""


class LRSchedulerConfigType(TypedDict, total=False):
    """A scheduler, and when it steps."""

    scheduler: Required[LRSchedulerTypeUnion]
    name: str | None
    interval: str
    frequency: int
    reduce_on_plateau: bool
    monitor: str | None
    strict: bool


class OptimizerConfig(TypedDict):
    """An optimizer without a scheduler."""

    optimizer: Optimizer


class OptimizerLRSchedulerConfig(TypedDict):
    """An optimizer and its scheduler."""

    optimizer: Optimizer
    lr_scheduler: LRSchedulerTypeUnion | LRSchedulerConfigType
    monitor: NotRequired[str]


OptimizerLRScheduler: TypeAlias = (
    Optimizer
    | Sequence[Optimizer]
    | tuple[Sequence[Optimizer], Sequence[LRSchedulerTypeUnion | LRSchedulerConfigType]]
    | OptimizerConfig
    | OptimizerLRSchedulerConfig
    | Sequence[OptimizerConfig]
    | Sequence[OptimizerLRSchedulerConfig]
    | None
)
"""What ``configure_optimizers`` returns."""


@dataclass(slots=True)
class LRSchedulerConfig:
    """A learning-rate scheduler and when it steps, as the Trainer keeps what ``configure_optimizers`` returned."""

    scheduler: LRScheduler | Any
    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True
