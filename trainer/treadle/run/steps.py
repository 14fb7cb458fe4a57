"""Count the optimizer steps of a fit, wherever they are made."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from treadle.run.progress import FitProgress

__all__ = ["StepCounter"]


class StepCounter:
    """Learns of each optimizer step from torch, which calls it after the step: in any hook, of any optimizer.

    The optimizers that ``configure_optimizers`` returned count, and others that hold a parameter of the module.

    Args:
        progress: counts the steps.
        module: the module that is trained.
    """

    def __init__(self, progress: FitProgress, module: Module) -> None:
        self._progress, self._module = progress, module
        self._counts: dict[Optimizer, bool] = {}  # the returned optimizers; False while a step is left out
        self._expected: dict[Optimizer, int] = {}  # the number of optimizer steps with the step under way
        self._handle: Any = None  # of the hook, while steps are counted
        self._others: WeakKeyDictionary[Optimizer, tuple[int, bool]] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> StepCounter:
        return self  # a copy of an optimizer is not a copy of its run

    def add(self, optimizer: Optimizer) -> None:
        """Count the steps of an optimizer of ``configure_optimizers``."""
        self._counts[optimizer] = True

    @contextmanager
    def counting(self) -> Generator[None]:
        """While entered, count the steps."""
        self._handle = register_optimizer_step_post_hook(self._hook())
        try:
            yield
        finally:
            self._handle.remove()
            self._handle = None

    @contextmanager
    def paused(self) -> Generator[None]:
        """While entered, the steps of trials do not count."""
        counting = self._handle is not None
        if counting:
            self._handle.remove()
        try:
            yield
        finally:
            if counting:
                self._handle = register_optimizer_step_post_hook(self._hook())

    def _hook(self) -> Callable[..., None]:
        progress, counts = self._progress, self._counts.get

        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            known = counts(optimizer)
            if not known and (known is False or not self._trains_module(optimizer)):
                return
            progress.optimizer_steps += 1
            if not progress.stepped:  # several at one batch, or between two batches, make one `step`
                progress.stepped = True
                progress.step += 1
                progress.step_in_epoch += 1

        return stepped

    def _trains_module(self, optimizer: Optimizer) -> bool:
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        known, found = self._others.get(optimizer, (-1, False))
        if known != count:  # it may have got parameters since it was looked at
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            found = any(id(p) in held for p in self._module.parameters())
            self._others[optimizer] = count, found
        return found

    # Around a step through the optimizer's wrapper, which makes exactly one step or leaves it out

    def begin(self, optimizer: Optimizer) -> None:
        """A step begins."""
        self._counts[optimizer] = True
        self._expected[optimizer] = self._progress.optimizer_steps + 1

    def leave_out(self, optimizer: Optimizer) -> None:
        """The gradients of the step under way are gone, so that it changes nothing: it does not count."""
        self._counts[optimizer] = False

    def end(self, optimizer: Optimizer) -> None:
        """The step has ended."""
        expected = self._expected.pop(optimizer)
        if not self._counts[optimizer]:
            self._counts[optimizer] = True
        elif self._progress.optimizer_steps != expected:
            self._progress.settle_steps(expected)
