"""What comes between the gradients of an accumulation and the step of each optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from treadle.loops.step.clipping import Clipping
from treadle.run.run import ReadyRun

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Preparation"]


class Preparation:
    """Makes gradients ready for a step: those of all optimizers normalized and looked at together; then those of one
    after the other unscaled, shown to the listeners, clipped.

    Args:
        run: the run.
        optimizers: that step together.
        clipping: how to clip. Default: not at all.
    """

    def __init__(self, run: ReadyRun, optimizers: Sequence[Optimizer], clipping: Clipping | None = None) -> None:
        self._loss, self._results, self._optimizers = run.loss, run.results, tuple(optimizers)
        self._precision = run.fabric.strategy.precision
        self._listeners = run.dispatch.listeners("on_before_optimizer_step")
        self._clipping: Callable[..., Any] | None = clipping
        if clipping is not None and not clipping.hooked:  # the module's own hook is measured as such
            self._clipping = run.timed(clipping, "configure_gradient_clipping", run.module)
        self.shows = bool(self._listeners) or clipping is not None
        """Whether :meth:`show` does anything."""

    def permits(self, window: float = 1, done: float = 1) -> bool:
        """Normalize the gradients of all optimizers, and look at them.

        Args:
            window: the number of batches that the losses were divided by.
            done: the number of batches in the accumulation.

        Returns:
            Whether the optimizers may step; if not, their gradients are gone, so that a step finds nothing to do.
        """
        if self._loss.prepare(self._optimizers, window, done):
            return True
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        return False

    def show(self, optimizer: Optimizer) -> None:
        """Unscale the gradients of an optimizer that is about to step, show them to the listeners, and clip them."""
        if not self.shows:
            return
        self._precision.unscale_gradients(optimizer)
        self._results.hook = "on_before_optimizer_step"
        for listener in self._listeners:
            listener(optimizer)
        if self._clipping is not None:
            self._clipping(optimizer)
