"""What empties the gradients where an accumulation begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from treadle.module import LightningModule
from treadle.module.overriding import overrides
from treadle.run.run import ReadyRun

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["make_zero_grad"]


def make_zero_grad(run: ReadyRun, optimizers: Sequence[Optimizer]) -> Callable[[], None]:
    """What empties the gradients, with its hooks; nothing where there is no optimizer, or an engine does it."""
    strategy = run.fabric.strategy
    if not optimizers or strategy.handles_gradient_accumulation or strategy.owns_optimizer_step:
        return lambda: None
    each = [_zero_grad_of(run, optimizer) for optimizer in optimizers]
    if len(each) == 1:
        return each[0]

    def of_all() -> None:
        for zero_grad in each:
            zero_grad()

    return of_all


def _zero_grad_of(run: ReadyRun, optimizer: Optimizer) -> Callable[[], None]:
    """What empties the gradients of one optimizer."""
    dispatch, progress, results = run.dispatch, run.progress, run.results
    listeners, hook = dispatch.listeners("on_before_zero_grad"), run.module.optimizer_zero_grad

    def by_hook() -> None:
        dispatch.run("optimizer_zero_grad", hook, progress.epoch, progress.batch, optimizer)

    own = overrides(run.module, "optimizer_zero_grad", LightningModule)
    zero_grad: Callable[[], None] = (
        by_hook if own else run.timed(optimizer.zero_grad, "optimizer_zero_grad", run.module)
    )
    if not listeners:
        return zero_grad

    def announced() -> None:
        results.hook = "on_before_zero_grad"
        for listener in listeners:
            listener(optimizer)
        zero_grad()

    return announced
