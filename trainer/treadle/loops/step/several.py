"""Automatic optimization with several optimizers over disjoint parameters, which step together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treadle.loops.optimizers import check_disjoint
from treadle.loops.step.automatic import AutomaticStep, not_evaluated, step_of
from treadle.loops.step.clipping import Clipping
from treadle.module import LightningModule
from treadle.module.overriding import overrides
from treadle.run.run import ReadyRun
from treadle_fabric import FabricOptimizer, MisconfigurationException
from treadle_fabric.precision import takes_closure

__all__ = ["SeveralOptimizersStep"]


class SeveralOptimizersStep(AutomaticStep):
    """One forward and backward pass a batch, and then a step of each optimizer in the order of the list::

        zero the gradients of all; forward; backward
        normalize and look at the gradients of all together: all optimizers may step, or none
        for each optimizer: on_before_optimizer_step, clip its gradients by their own norm, step

    Args:
        run: the run.
        clipping: how to clip the gradients of an optimizer.
        wrapped: the optimizers, in their wrappers.
    """

    def __init__(self, run: ReadyRun, clipping: Clipping, wrapped: Sequence[FabricOptimizer]) -> None:
        super().__init__(run, clipping, [each.optimizer for each in wrapped])
        self._wrapped = tuple(wrapped)
        self._optimizer_steps = [(each, step_of(run, each)) for each in self._optimizers]
        own = overrides(run.module, "optimizer_step", LightningModule)
        takes = any(takes_closure(each) for each in self._optimizers)
        self._must_evaluate = takes and not own
        self.step = self._step_with_closures if own or takes else run.timed(self._step, "optimizer_step", run.module)

    def _check(self, accumulate: int) -> None:
        check_disjoint(self._optimizers, self._run.module)  # a callback may have added parameters

    def _step_all(self) -> None:
        progress, preparation = self._progress, self._preparation
        expected = progress.optimizer_steps + len(self._optimizers)
        for optimizer, step in self._optimizer_steps:
            if preparation.shows:
                preparation.show(optimizer)
            step()
        if progress.optimizer_steps != expected:
            progress.settle_steps(expected)

    def _step(self, batch: Any, batch_idx: int, window: float, done: float) -> Any:
        outputs = self._gradients.of(batch, batch_idx, window, done)[0]
        if self._preparation.permits(window, done + 1):
            self._step_all()
        return outputs

    def _step_with_closures(self, batch: Any, batch_idx: int, window: float, done: float) -> Any:
        """Call ``optimizer_step`` for each optimizer; the closure that is called first runs forward and backward.

        Each closure then shows and clips the gradients of its optimizer. This is the step of modules that override
        ``optimizer_step``, and of optimizers of which one may need its closure.
        """
        outputs: Any = None
        loss: Tensor | None = None
        permitted = False
        called: set[int] = set()

        def closure_of(index: int) -> Callable[[], Tensor | None]:
            optimizer = self._optimizers[index]

            def closure() -> Tensor | None:
                nonlocal outputs, loss, permitted
                if index in called:
                    raise _evaluated_again(optimizer, batch_idx)
                with torch.enable_grad():
                    if not called:
                        outputs, mean = self._gradients.of(batch, batch_idx, window, done)
                        loss = mean / window if mean is not None and window > 1 else mean
                        permitted = self._preparation.permits(window, done + 1)
                    called.add(index)
                    if permitted:
                        self._preparation.show(optimizer)
                    else:
                        self._steps.leave_out(optimizer)
                return loss

            return closure

        hook, epoch, run = self._run.module.optimizer_step, self._progress.epoch, self._run.dispatch.run
        for index, wrapped in enumerate(self._wrapped):
            self._steps.add(wrapped.optimizer)
            run("optimizer_step", hook, epoch, batch_idx, wrapped, closure_of(index))
            if self._must_evaluate and index not in called:
                raise not_evaluated(wrapped.optimizer)
        return outputs


def _evaluated_again(optimizer: Any, batch_idx: int) -> MisconfigurationException:
    return MisconfigurationException(
        f"The closure of {type(optimizer).__name__} was called twice at batch_idx {batch_idx}: with several optimizers,"
        " forward and backward run once a batch, so that the closure has no second loss to give. Call the closure once,"
        " or step by hand: `self.automatic_optimization = False`."
    )
