"""Average gradients over processes at the end of a backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from treadle_fabric.strategies.on_xla.exchange import Exchange

__all__ = ["GradientAveraging"]


class GradientAveraging:
    """Averages the gradients of modules over the processes when a backward pass that reached them ends.

    A mean is linear: gradients that were averaged before, and to which each process added its own, are averaged right.
    Each process needs gradients for the same parameters, as XLA needs the same operations of each.

    Args:
        exchange: Gives how tensors are exchanged.
    """

    def __init__(self, exchange: Callable[[], Exchange | None]) -> None:
        self._exchange = exchange
        self._handles: dict[int, Any] = {}
        self._waiting: weakref.WeakKeyDictionary[Module, bool] = weakref.WeakKeyDictionary()

    def watch(self, module: Module, only: Callable[[Tensor], bool] = lambda parameter: True) -> None:
        """Average the gradients of a module from now on.

        Args:
            module: The module.
            only: Whether to average the gradient of a parameter. Default: those of all.
        """
        if id(module) in self._handles:
            self._handles.pop(id(module)).remove()
        parameters = [p for p in module.parameters() if p.requires_grad and only(p)]
        if not parameters:
            return
        known = weakref.ref(module)

        def end() -> None:
            here = known()
            exchange = self._exchange()
            if here is not None and exchange is not None and not self._waiting.get(here, False):
                with torch.no_grad():
                    exchange.average([p.grad for p in here.parameters() if p.grad is not None and only(p)])

        def begin(gradient: Tensor) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(end)

        self._handles[id(module)] = torch.autograd.graph.register_multi_grad_hook(parameters, begin, mode="any")

    @contextmanager
    def paused(self, module: Module) -> Generator[None]:
        """Leave the gradients of a module as they are on each process, while entered."""
        before = self._waiting.get(module, False)
        self._waiting[module] = True
        try:
            yield
        finally:
            self._waiting[module] = before

    def end(self) -> None:
        """Average no gradients any more."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
