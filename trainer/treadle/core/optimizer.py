"""The optimizers that a module gets from ``self.optimizers()``, where users of a trainer look for them."""

from torch.optim import Optimizer

from treadle.loops.optimizers import parse_optimizers
from treadle.module import LightningModule, LRSchedulerConfig
from treadle.module.optimizer import LightningOptimizer

__all__ = ["LightningOptimizer", "do_nothing_closure"]


def do_nothing_closure() -> None:
    """Do nothing: a closure for the step of an optimizer that needs none."""


def _init_optimizers_and_lr_schedulers(model: LightningModule) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Call ``configure_optimizers`` of a module, and return its optimizers, and its schedulers with when they step.

    Raises:
        MisconfigurationException: What the method returned has a wrong form.
    """
    return parse_optimizers(model.configure_optimizers(), model)
