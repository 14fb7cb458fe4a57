"""One training batch in manual optimization: the user's step does it all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from treadle.loops.step.arguments import step_arguments
from treadle.module import LightningModule
from treadle.module.overriding import overrides
from treadle.run.run import ReadyRun
from treadle_fabric import MisconfigurationException

__all__ = ["ManualStep", "manual_backward"]


class ManualStep:
    """Manual optimization: the module steps its optimizers itself."""

    def __init__(self, run: ReadyRun) -> None:
        self._results = run.results
        self._training_step = run.wrapped.method("training_step")
        self._takes, self.wants_iterator = step_arguments(run.module.training_step, ("batch", "batch_idx"))
        self._gives_outputs = bool(run.dispatch.listeners("on_train_batch_end"))
        self._watch = None if run.optimizers else run.watch  # those of `configure_optimizers` ask before they step
        self.idle = 0

    def accumulate(self, batches: int) -> None:
        """Nothing to do: the module accumulates by itself."""

    def __call__(self, batch: Any, batch_idx: int, window: int, stepping: bool) -> Any:
        self._results.hook = "training_step"
        output = self._training_step(batch, batch_idx) if self._takes == 2 else self._training_step(batch)
        if self._watch is not None:
            self._watch.allows(None)
        if not self._gives_outputs or output is None:
            return {} if self._gives_outputs else None
        if isinstance(output, Tensor):
            return {"loss": output.detach()}
        if isinstance(output, Mapping):
            return {k: v.detach() if k == "loss" and isinstance(v, Tensor) else v for k, v in output.items()}
        raise MisconfigurationException(
            f"`training_step` returned {type(output).__name__}; in manual optimization it returns a tensor, a dict or"
            " None."
        )


def manual_backward(run: ReadyRun, loss: Tensor, *args: Any, **kwargs: Any) -> None:
    """Backward in manual optimization, with its hooks."""
    module, dispatch, strategy = run.module, run.dispatch, run.fabric.strategy
    dispatch.call("on_before_backward", loss)
    if run.watch is not None:
        run.watch.take(loss)
    strategy.expect_backward(loss)
    engine = run.wrapped.forward_module
    if overrides(module, "backward", LightningModule):
        precision = strategy.precision
        precision.pre_backward(loss, engine)
        dispatch.run("backward", precision.backward_by, module.backward, loss, *args, **kwargs)
        precision.post_backward(loss, engine)
    else:
        strategy.backward(loss, engine, *args, **kwargs)
    dispatch.call("on_after_backward")
    run.results.hook = "training_step"
