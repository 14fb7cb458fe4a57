"""Automatic optimization: forward, zero, scale, backward; where an accumulation ends also prepare, step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from treadle.loops.step.clipping import Clipping
from treadle.loops.step.gradients import Gradients
from treadle.loops.step.preparation import Preparation
from treadle.loops.step.whole import WholeBatchGradients
from treadle.run.run import ReadyRun
from treadle_fabric import MisconfigurationException

__all__ = ["AutomaticStep", "not_evaluated", "step_of"]


def step_of(run: ReadyRun, optimizer: Optimizer) -> Callable[[], Any]:
    """Return what steps an optimizer: the strategy, or the optimizer alone where the strategy adds nothing."""
    plain: Any = optimizer
    strategy = run.fabric.strategy
    by_strategy = partial(strategy.optimizer_step, optimizer)
    # Looked up at each step: schedulers put another `step` into its place
    step = (lambda: plain.step()) if strategy.plain_step else by_strategy
    return run.timed(step, "optimizer_step", strategy)


def not_evaluated(optimizer: Optimizer) -> MisconfigurationException:
    """Return the error for an optimizer that got a closure and did not call it."""
    return MisconfigurationException(
        f"{type(optimizer).__name__}.step got a closure that runs `training_step` and backward, and did not call it:"
        " call it in every step, or override `optimizer_step` in the module."
    )


class AutomaticStep(ABC):
    """What all kinds of automatic optimization have in common; the leaves step one optimizer, several, or none.

    Args:
        run: the run.
        clipping: how to clip the gradients of an optimizer.
        optimizers: the plain optimizers.

    Attributes:
        accumulate: trains on a micro-batch that others of its accumulation follow.
        step: trains on the last micro-batch of an accumulation, and steps; the leaf chooses how.
        wants_iterator: whether ``training_step`` draws its batches itself.

    ``accumulate`` and ``step`` take a batch on the device, its number in the epoch, the number of batches of the
    accumulation, which the loss is divided by, and how many of them came before. They return what
    ``on_train_batch_end`` gets.
    """

    step: Callable[..., Any]

    def __init__(self, run: ReadyRun, clipping: Clipping, optimizers: Sequence[Optimizer]) -> None:
        strategy = run.fabric.strategy
        self._run, self._loss, self._progress, self._steps = run, run.loss, run.progress, run.steps
        self._optimizers = tuple(optimizers)
        self._gradients = (WholeBatchGradients if strategy.runs_whole_batch else Gradients)(run, self._optimizers)
        self.wants_iterator = self._gradients.wants_iterator
        clipping.tell_unused()
        clips = clipping.active and not strategy.handles_gradient_clipping
        self._preparation = Preparation(run, self._optimizers, clipping if clips else None)
        self._no_sync = partial(run.fabric.no_backward_sync, run.wrapped) if strategy.world_size > 1 else nullcontext
        self.accumulate: Callable[..., Any] = self._accumulate

    @abstractmethod
    def _step_all(self) -> None:
        """Step every optimizer; the gradients of all of them may be taken."""

    @property
    def idle(self) -> int:
        """The number of batches of this epoch without anything to learn from."""
        return self._gradients.idle

    def begin_epoch(self, accumulate: int) -> None:
        """Begin an epoch, with the number of batches of an accumulation."""
        self._check(accumulate)
        self._gradients.idle = 0
        self._loss.forget()

    def _check(self, accumulate: int) -> None:
        """Refuse what the optimizers cannot do in an epoch. Default: nothing."""

    def finish(self, window: float, done: float) -> None:
        """Step for an accumulation to which no other batch will come.

        Args:
            window: The number of batches that its losses were divided by.
            done: The number of batches that it has.
        """
        strategy = self._run.fabric.strategy
        if not self._optimizers or strategy.handles_gradient_accumulation:
            return
        if strategy.shards_parameters:
            strategy.settle_gradients(self._run.engine)
        elif strategy.world_size > 1:  # what was accumulated is of each rank alone
            groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
            for parameter in (p for group in groups for p in group["params"] if p.requires_grad):
                mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = strategy.all_reduce(mine, reduce_op="mean")
        if self._preparation.permits(window, done):
            self._step_all()

    def _accumulate(self, batch: Any, batch_idx: int, window: float, done: float) -> Any:
        with self._no_sync():
            return self._gradients.of(batch, batch_idx, window, done)[0]
