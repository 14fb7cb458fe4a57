"""What ``self.optimizers()`` returns in a module."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from torch.optim import Optimizer

from treadle.run.run import ReadyRun
from treadle_fabric import FabricOptimizer

__all__ = ["LightningOptimizer"]


class LightningOptimizer(FabricOptimizer):
    """An optimizer of a run: its ``step`` goes through strategy, precision and hooks.

    Instances also are of the class of the user's optimizer.

    Args:
        optimizer: The user's optimizer.
        run: The run.
        before_step: Called with the user's optimizer before each step.
        after_step: The same after it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        run: ReadyRun,
        before_step: Callable[[Optimizer], None] | None = None,
        after_step: Callable[[Optimizer], None] | None = None,
    ) -> None:
        super().__init__(optimizer, run.fabric.strategy, before_step, after_step)
        self._run = run

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Generator[None]:
        """Let only this optimizer's parameters require gradients, for the length of a with block.

        Args:
            sync_grad: Reduce the gradients over the ranks in backward. False for all but the last batch of an
                accumulation. Default: True.
        """
        run = self._run
        with run.fabric.no_backward_sync(run.wrapped, enabled=not sync_grad):
            with run.module.toggled_optimizer(self):
                yield
