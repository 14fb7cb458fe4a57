"""Automatic optimization: forward, zero, scale, backward; where an accumulation ends also prepare, step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from treadle.loops.step.clipping import Clipping
from treadle.loops.step.gradients import Gradients, WholeBatchGradients
from treadle.loops.step.preparation import Preparation
from treadle.module import LightningModule
from treadle.module.overriding import overrides
from treadle.run.run import ReadyRun
from treadle_fabric import MisconfigurationException
from treadle_fabric.precision import needs_closure

__all__ = ["AutomaticStep"]


class AutomaticStep:
    """Automatic optimization with one optimizer, or none.

    Attributes:
        accumulate: trains on a micro-batch that others of its accumulation follow.
        step: trains on the last micro-batch of an accumulation, and steps the optimizer.
        wants_iterator: whether ``training_step`` draws its batches itself.

    ``accumulate`` and ``step`` take a batch on the device, its number in the epoch, and the number of batches of the
    accumulation, which the loss is divided by. They return what ``on_train_batch_end`` gets.
    """

    def __init__(self, run: ReadyRun, clipping: Clipping) -> None:
        strategy, module = run.fabric.strategy, run.module
        self._run, self._loss, self._progress, self._steps = run, run.loss, run.progress, run.steps
        self._wrapped_optimizer = run.optimizers[0] if run.optimizers else None
        optimizer: Any = self._wrapped_optimizer.optimizer if self._wrapped_optimizer is not None else None
        self._gradients = (WholeBatchGradients if strategy.runs_whole_batch else Gradients)(run, optimizer)
        self.wants_iterator = self._gradients.wants_iterator
        clips = clipping.active and not strategy.handles_gradient_clipping
        self._prepare = Preparation(run, clipping if clips else None)
        self._optimizer = optimizer
        self._optimizer_step: Callable[[], Any] = partial(strategy.optimizer_step, optimizer)
        if strategy.plain_step:
            self._optimizer_step = lambda: optimizer.step()  # schedulers put another `step` into its place
        self._no_sync = partial(run.fabric.no_backward_sync, run.wrapped) if strategy.world_size > 1 else nullcontext
        self._needs_loss = optimizer is not None and needs_closure(optimizer)
        in_engine = strategy.handles_gradient_accumulation and optimizer is not None
        self.accumulate = self._accumulate_in_engine if in_engine else self._accumulate
        self.step = self._step
        if optimizer is None:
            self.step = self._step_without_optimizer
        elif self._needs_loss or overrides(module, "optimizer_step", LightningModule):
            self.step = self._step_with_closure

    @property
    def idle(self) -> int:
        """The number of batches of this epoch without anything to learn from."""
        return self._gradients.idle

    def begin_epoch(self, accumulate: int) -> None:
        """Begin an epoch, with the number of batches of an accumulation."""
        if accumulate > 1 and self._needs_loss:
            raise MisconfigurationException(
                f"accumulate_grad_batches={accumulate}, but {type(self._optimizer).__name__} evaluates the loss several"
                " times a step, of one batch only: use larger batches, or an optimizer without a closure."
            )
        self._gradients.accumulate, self._gradients.idle = accumulate, 0
        self._loss.forget()

    def _accumulate(self, batch: Any, batch_idx: int, window: int) -> Any:
        with self._no_sync():
            return self._gradients.of(batch, batch_idx, window)[0]

    def _accumulate_in_engine(self, batch: Any, batch_idx: int, window: int) -> Any:
        outputs = self._gradients.of(batch, batch_idx, window)[0]
        self._optimizer_step()  # the engine counts: it steps at the last micro-batch only
        return outputs

    def _step(self, batch: Any, batch_idx: int, window: int) -> Any:
        outputs = self._gradients.of(batch, batch_idx, window)[0]
        if self._prepare.of(self._optimizer, window, batch_idx % self._gradients.accumulate + 1):
            progress = self._progress
            expected = progress.optimizer_steps + 1
            self._optimizer_step()  # torch reports the step to the step counter
            if progress.optimizer_steps != expected:
                progress.settle_steps(expected)
        return outputs

    def _step_without_optimizer(self, batch: Any, batch_idx: int, window: int) -> Any:
        outputs = self._gradients.of(batch, batch_idx, window)[0]
        if not self._loss.prepare(None, window, batch_idx % self._gradients.accumulate + 1):
            self._run.module.zero_grad()
        return outputs

    def _step_with_closure(self, batch: Any, batch_idx: int, window: int) -> Any:
        """The optimizer runs the forward and backward itself, perhaps several times."""
        outputs = None

        def closure() -> Tensor | None:
            nonlocal outputs
            with torch.enable_grad():
                outputs, loss = self._gradients.of(batch, batch_idx, window)
                if not self._prepare.of(self._optimizer, window, batch_idx % self._gradients.accumulate + 1):
                    self._steps.leave_out(self._optimizer)
            if loss is None and self._needs_loss:
                raise MisconfigurationException(
                    f"`training_step` gave nothing to learn from at batch_idx {batch_idx} (None, a weight of 0, or a"
                    f" batch of 0 samples), but {type(self._optimizer).__name__} evaluates the loss several times a"
                    " step, and needs one for every batch: leave such batches out of the loader, or use an optimizer"
                    " without a closure."
                )
            return loss / window if loss is not None and window > 1 else loss

        hook, epoch = self._run.module.optimizer_step, self._progress.epoch
        self._steps.add(self._optimizer)
        self._run.dispatch.run("optimizer_step", hook, epoch, batch_idx, self._wrapped_optimizer, closure)
        return outputs
