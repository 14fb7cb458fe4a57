"""The types of what a module's methods return, where users of a trainer look for them."""

from typing import Any, TypeAlias

from torch.nn.parallel import DistributedDataParallel

from treadle.module import LRSchedulerConfig
from treadle.module.steps.returned import (
    EVAL_DATALOADERS,
    STEP_OUTPUT,
    TRAIN_DATALOADERS,
    LRSchedulerConfigType,
    LRSchedulerPLType,
    LRSchedulerTypeTuple,
    LRSchedulerTypeUnion,
    OptimizerConfig,
    OptimizerLRScheduler,
    OptimizerLRSchedulerConfig,
)

__all__ = [
    "EVAL_DATALOADERS",
    "STEP_OUTPUT",
    "TRAIN_DATALOADERS",
    "DistributedDataParallel",
    "LRSchedulerConfig",
    "LRSchedulerConfigType",
    "LRSchedulerPLType",
    "LRSchedulerType",
    "LRSchedulerTypeTuple",
    "LRSchedulerTypeUnion",
    "OptimizerConfig",
    "OptimizerLRScheduler",
    "OptimizerLRSchedulerConfig",
]

_NUMBER: TypeAlias = int | float
_METRIC: TypeAlias = Any  # a tensor, a number or an object of torchmetrics, which need not be installed
LRSchedulerType: TypeAlias = type[LRSchedulerTypeUnion]
