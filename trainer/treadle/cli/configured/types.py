"""The types of optimizers, schedulers and arguments on a command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from jsonargparse import Namespace
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

__all__ = [
    "ArgsType",
    "LRSchedulerCallable",
    "LRSchedulerTypeTuple",
    "LRSchedulerTypeUnion",
    "OptimizerCallable",
    "ReduceLROnPlateau",
]


class ReduceLROnPlateau(lr_scheduler.ReduceLROnPlateau):
    """The scheduler of torch, which knows the metric that it watches.

    Args:
        optimizer: The optimizer.
        monitor: The name of a logged metric.
        *args: For :class:`torch.optim.lr_scheduler.ReduceLROnPlateau`.
        **kwargs: For the same.
    """

    def __init__(self, optimizer: Optimizer, monitor: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(optimizer, *args, **kwargs)
        self.monitor = monitor


LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
LRSchedulerTypeUnion: TypeAlias = LRScheduler | ReduceLROnPlateau
OptimizerCallable: TypeAlias = Callable[[Iterable[Any]], Optimizer]
"""An argument of a module: called with parameters, it makes the optimizer that the config chose."""
LRSchedulerCallable: TypeAlias = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]
"""An argument of a module: called with an optimizer, it makes the scheduler that the config chose."""
ArgsType: TypeAlias = list[str] | dict[str, Any] | Namespace | None
"""What ``LightningCLI(args=...)`` takes: words of a command line, or values; None: the command line of the process."""
