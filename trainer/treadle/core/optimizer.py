"""The optimizers that a module gets from ``self.optimizers()``, where users of a trainer look for them."""

from treadle.module.optimizer import LightningOptimizer

__all__ = ["LightningOptimizer", "do_nothing_closure"]


def do_nothing_closure() -> None:
    """Do nothing: a closure for the step of an optimizer that needs none."""
