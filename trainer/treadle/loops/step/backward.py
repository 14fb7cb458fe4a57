"""The backward pass of a loss, with its hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from treadle.module import LightningModule
from treadle.module.overriding import overrides
from treadle.run.run import ReadyRun
from treadle_fabric import check_loss

__all__ = ["automatic_backward", "manual_backward"]


def _with_listeners(run: ReadyRun, differentiate: Callable[..., None]) -> Callable[..., None]:
    """Make the function that differentiates a loss and tells the listeners before and after.

    Args:
        run: the run.
        differentiate: what does it.
    """
    results, listeners = run.results, run.dispatch.listeners
    before, after = listeners("on_before_backward"), listeners("on_after_backward")
    if not before and not after:
        return differentiate

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if before:
            results.hook = "on_before_backward"
            for listener in before:
                listener(loss)
        differentiate(loss, *args, **kwargs)
        if after:
            results.hook = "on_after_backward"
            for listener in after:
                listener()

    return backward


def automatic_backward(run: ReadyRun) -> Callable[[Tensor], None]:
    """Make the backward pass of automatic optimization, with an explanation where it fails because of the loss."""
    strategy, engine = run.fabric.strategy, run.engine
    by_strategy = Tensor.backward if strategy.plain_backward else lambda loss: strategy.backward(loss, engine)
    progress, own = run.progress, _own_backward(run)
    kept: Tensor | None = None

    def differentiate(loss: Tensor) -> None:
        nonlocal kept
        progress.differentiated = progress.batches + 1
        # As the variable of a hand-written loop: the next forward finds the graph's nodes of the parameters.
        kept = loss
        try:
            by_strategy(loss)
        except RuntimeError as error:
            check_loss(loss, "`training_step` returned")
            if (explained := strategy.explain_error(None, error)) is not None:
                raise explained from error
            raise

    def by_module(loss: Tensor) -> None:
        progress.differentiated = progress.batches + 1
        assert own is not None
        own(loss)

    return _with_listeners(run, run.timed(differentiate if own is None else by_module, "backward", strategy))


def manual_backward(run: ReadyRun, loss: Tensor, *args: Any, **kwargs: Any) -> None:
    """Differentiate a loss in manual optimization; the arguments are those of ``Tensor.backward``."""
    strategy, engine, own = run.fabric.strategy, run.engine, _own_backward(run)

    def differentiate(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        run.loss.scale(loss, None, 1, True)
        strategy.expect_backward(loss)
        try:
            if own is not None:
                own(loss, *args, **kwargs)
            else:
                strategy.backward(loss, engine, *args, **kwargs)
        except RuntimeError as error:
            if not args and not kwargs:
                check_loss(loss, "`manual_backward` got")
            if (explained := strategy.explain_error(None, error)) is not None:
                raise explained from error
            raise
        strategy.after_inner_backward()

    if run.profiler is not None:
        differentiate = run.timed(differentiate, "backward", strategy)
    _with_listeners(run, differentiate)(loss, *args, **kwargs)
    run.results.hook = "training_step"


def _own_backward(run: ReadyRun) -> Callable[..., None] | None:
    """The module's own ``backward``, with a scaled loss where the precision scales; None where it has none."""
    if not overrides(run.module, "backward", LightningModule):
        return None
    module, precision, engine = run.module, run.fabric.strategy.precision, run.engine

    def differentiate(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        precision.pre_backward(loss, engine)
        run.dispatch.run("backward", precision.backward_by, module.backward, loss, *args, **kwargs)
        precision.post_backward(loss, engine)

    return differentiate
