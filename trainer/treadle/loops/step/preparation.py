"""What comes between the gradients of an accumulation and the optimizer's step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treadle.loops.step.clipping import Clipping
from treadle.run.run import ReadyRun

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Preparation"]


class Preparation:
    """Makes gradients ready for a step: normalized, looked at, unscaled, shown to the listeners, clipped.

    Args:
        run: the run.
        clipping: how to clip. Default: not at all.
    """

    def __init__(self, run: ReadyRun, clipping: Clipping | None = None) -> None:
        self._loss, self._results = run.loss, run.results
        self._precision = run.fabric.strategy.precision
        self._listeners = run.dispatch.listeners("on_before_optimizer_step")
        self._clipping = clipping

    def of(self, optimizer: Optimizer, window: float = 1, done: float = 1) -> bool:
        """Prepare the gradients of ``optimizer``.

        Args:
            optimizer: about to step.
            window: the number of batches that the losses were divided by.
            done: the number of batches in the accumulation.

        Returns:
            Whether the optimizer may step; if not, its gradients are gone, so that a step finds nothing to do.
        """
        if not self._loss.prepare(optimizer, window, done):
            optimizer.zero_grad()
            return False
        if self._listeners or self._clipping is not None:
            self._precision.unscale_gradients(optimizer)
            self._results.hook = "on_before_optimizer_step"
            for listener in self._listeners:
                listener(optimizer)
            if self._clipping is not None:
                self._clipping(optimizer)
        return True
