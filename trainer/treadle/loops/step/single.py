"""Automatic optimization with one optimizer, or without any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from treadle.loops.step.automatic import AutomaticStep, not_evaluated, step_of
from treadle.loops.step.clipping import Clipping
from treadle.module import LightningModule
from treadle.module.overriding import overrides
from treadle.run.run import ReadyRun
from treadle_fabric import FabricOptimizer, MisconfigurationException
from treadle_fabric.precision import needs_closure, takes_closure

__all__ = ["NoOptimizerStep", "SingleOptimizerStep"]


class NoOptimizerStep(AutomaticStep):
    """Training steps of a fit that changes no weights.

    Args:
        run: the run.
        clipping: not used; there is nothing to clip.
    """

    def __init__(self, run: ReadyRun, clipping: Clipping) -> None:
        super().__init__(run, clipping, ())
        self.step = self._step

    def _step(self, batch: Any, batch_idx: int, window: float, done: float) -> Any:
        outputs = self._gradients.of(batch, batch_idx, window, done)[0]
        if not self._loss.prepare((), window, done + 1):
            self._run.module.zero_grad()
        return outputs

    def _step_all(self) -> None:
        """Do nothing."""


class SingleOptimizerStep(AutomaticStep):
    """Automatic optimization with one optimizer.

    Args:
        run: the run.
        clipping: how to clip the gradients.
        wrapped: the optimizer, in its wrapper.
    """

    def __init__(self, run: ReadyRun, clipping: Clipping, wrapped: FabricOptimizer) -> None:
        strategy, optimizer = run.fabric.strategy, wrapped.optimizer
        super().__init__(run, clipping, [optimizer])
        self._wrapped_optimizer, self._optimizer = wrapped, optimizer
        self._shows, self._show = self._preparation.shows, self._preparation.show
        self._optimizer_step = step_of(run, optimizer)
        self._needs_loss = needs_closure(optimizer)
        self._kept: list[tuple[Any, int]] = []  # the earlier batches of an accumulation, where the loss is needed anew
        if self._needs_loss:
            self.accumulate = self._accumulate_and_keep
        if strategy.handles_gradient_accumulation:
            self.accumulate = self._accumulate_in_engine
        own = overrides(run.module, "optimizer_step", LightningModule)
        # The action includes forward and backward, as the closure of an `optimizer_step` does
        plain = run.timed(self._step, "optimizer_step", run.module)
        takes = takes_closure(optimizer) and not strategy.handles_gradient_accumulation
        self._must_evaluate = takes and not own
        self.step = self._step_with_closure if own or takes or self._needs_loss else plain

    def _check(self, accumulate: int) -> None:
        progress = self._progress
        begun = 0.0 if progress.is_last_batch else progress.accumulation.place(progress.batch, math.inf).done
        goes_on = accumulate == progress.accumulation.every and not progress.is_last_batch
        begun = progress.accumulation.place(progress.batch, math.inf).done if goes_on else 0.0
        if begun and self._needs_loss and not self._run.fabric.strategy.handles_gradient_accumulation:
            raise MisconfigurationException(
                f"The run goes on at batch {progress.batch} of epoch {progress.epoch}, after {begun:g} batch(es) of an"
                f" accumulation: {type(self._optimizer).__name__} evaluates the loss of all batches of an accumulation"
                " anew, and a checkpoint has only their gradients. Resume from a checkpoint that was saved where an"
                " accumulation ends, at the end of an epoch for example."
            )

    def _step_all(self) -> None:
        if self._kept:
            (*earlier, (batch, batch_idx)), self._kept = self._kept, []
            self._kept = earlier
            self._step_with_closure(batch, batch_idx, len(earlier) + 1, len(earlier), anew=True)
            return
        self._preparation.show(self._optimizer)
        expected = self._progress.optimizer_steps + 1
        self._optimizer_step()
        self._progress.settle_steps(expected)

    def _accumulate_in_engine(self, batch: Any, batch_idx: int, window: float, done: float) -> Any:
        outputs = self._gradients.of(batch, batch_idx, window, done)[0]
        self._optimizer_step()  # the engine counts: it steps at the last micro-batch only
        return outputs

    def _step(self, batch: Any, batch_idx: int, window: float, done: float) -> Any:
        outputs = self._gradients.of(batch, batch_idx, window, done)[0]
        if self._loss.prepare(self._optimizers, window, done + 1):  # `permits`, without its frame
            if self._shows:
                self._show(self._optimizer)
            progress = self._progress
            expected = progress.optimizer_steps + 1
            self._optimizer_step()  # torch reports the step to the step counter
            if progress.optimizer_steps != expected:
                progress.settle_steps(expected)
        else:
            self._optimizer.zero_grad()
        return outputs

    def _accumulate_and_keep(self, batch: Any, batch_idx: int, window: float, done: float) -> Any:
        if not done:
            self._kept.clear()
        self._kept.append((batch, batch_idx))
        return self._accumulate(batch, batch_idx, window, done)

    def _again(self, earlier: Sequence[tuple[Any, int]], window: float, done: float) -> Tensor | float:
        """Evaluate the earlier batches of an accumulation anew; returns their part of the mean loss."""
        if done and not earlier and not self._needs_loss:
            raise MisconfigurationException(
                f"{type(self._optimizer).__name__} evaluates the loss several times a step, and an accumulation has"
                " several batches: declare `def step(self, closure)`, without a default value, so that these batches"
                " are kept, or set accumulate_grad_batches=1."
            )
        total: Tensor | float = 0.0
        for i, (batch, batch_idx) in enumerate(earlier):
            with self._no_sync():
                loss = self._gradients.of(batch, batch_idx, window, i)[1]
            total = total if loss is None else total + loss.detach() / window
        return total

    def _step_with_closure(self, batch: Any, batch_idx: int, window: float, done: float, *, anew: bool = False) -> Any:
        """The optimizer runs the forward and backward itself, perhaps several times.

        The gradients of an accumulation's earlier batches are there for the first time, unless it is to begin ``anew``.
        """
        outputs, evaluated, earlier = None, False, tuple(self._kept)

        def closure() -> Tensor | None:
            nonlocal outputs, evaluated
            with torch.enable_grad():
                rest = self._again(earlier, window, done) if evaluated or anew else 0.0
                first, evaluated = not evaluated and not anew, True
                outputs, loss = self._gradients.of(batch, batch_idx, window, done if first else len(earlier))
                if self._loss.prepare(self._optimizers, window, done + 1):
                    if self._shows:
                        self._show(self._optimizer)
                else:
                    self._optimizer.zero_grad()
                    self._steps.leave_out(self._optimizer)
            if loss is None and self._needs_loss:
                raise MisconfigurationException(
                    f"`training_step` gave nothing to learn from at batch_idx {batch_idx} (None, a weight of 0, or a"
                    f" batch of 0 samples), but {type(self._optimizer).__name__} evaluates the loss several times a"
                    " step, and needs one for every batch: leave such batches out of the loader, or use an optimizer"
                    " without a closure."
                )
            return loss / window + rest if loss is not None and window > 1 else loss

        hook, epoch = self._run.module.optimizer_step, self._progress.epoch
        self._steps.add(self._optimizer)
        self._run.dispatch.run("optimizer_step", hook, epoch, batch_idx, self._wrapped_optimizer, closure)
        self._kept.clear()
        if self._must_evaluate and not evaluated:
            raise not_evaluated(self._optimizer)
        return outputs
