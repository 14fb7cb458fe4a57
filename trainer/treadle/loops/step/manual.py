"""Manual optimization: ``training_step`` runs backward and steps the optimizers itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from treadle.loops.step.gradients import without_batch
from treadle.module.steps.arguments import TRAINING_ARGUMENTS, bind_step
from treadle.run.run import ReadyRun
from treadle_fabric import MisconfigurationException

__all__ = ["ManualStep"]


class ManualStep:
    """Runs the ``training_step`` of a module that steps its optimizers itself."""

    idle = 0  # whether the module learned from a batch is not known

    def __init__(self, run: ReadyRun) -> None:
        self._run, self._results, self._loss = run, run.results, run.loss
        step, call = run.module.training_step, run.method("training_step", changes_weights=True)
        self._training_step, self.wants_iterator = bind_step(step, call, TRAINING_ARGUMENTS)
        self._gives_outputs = bool(run.dispatch.listeners("on_train_batch_end"))
        self._prepares = not run.optimizers  # an optimizer of `configure_optimizers` does it before each step

    def begin_epoch(self, accumulate: int) -> None:
        """Do nothing: the module accumulates by itself."""

    def finish(self, window: float, done: float) -> None:
        """Do nothing: the module accumulates by itself."""

    def step(self, batch: Any, batch_idx: int, window: float, done: float) -> Any:
        """Train on a batch; returns what ``on_train_batch_end`` gets."""
        self._results.hook = "training_step"
        output = self._training_step(batch, batch_idx) if batch is not None else without_batch(self._run)
        if self._prepares:
            self._loss.prepare((), 1, 1)
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

    accumulate = step
