"""Torch functions that mean something else while a model runs in parallel: attention, dropout, cross entropy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.nn import Module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

__all__ = ["Substitution"]


class Substitution(TorchFunctionMode):
    """A context in which some functions of torch are others, with the same arguments.

    A strategy lets it :meth:`follow` its engine, so that models call ``F.scaled_dot_product_attention`` and
    ``F.cross_entropy`` as ever. Inside a substitute the functions are torch's own.

    Args:
        substitutes: For functions of torch, what is called in their place.
    """

    def __init__(self, substitutes: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._substitutes = dict(substitutes)
        self._here = _Here()

    def __deepcopy__(self, memo: dict[int, Any]) -> Substitution:
        return self  # that of a copied module is this one

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return self._substitutes.get(func, func)(*args, **(kwargs or {}))

    def follow(self, modules: Iterable[Module]) -> None:
        """Enter this context around the forward pass of each module that is not called in it already.

        With all modules of a model, the context is there also where activation checkpointing runs some of them again,
        in the backward pass: autograd takes no context of this kind along.
        """
        for each in modules:
            each.register_forward_pre_hook(self._begin, prepend=True)
            each.register_forward_hook(self._end, always_call=True)

    def _begin(self, module: Module, args: Any) -> None:
        here = self._here
        if here.depth:
            here.depth += 1
        elif not any(mode is self for mode in _get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
            self.__enter__()  # type: ignore[no-untyped-call]
            here.depth = 1

    def _end(self, module: Module, args: Any, output: Any) -> None:
        here = self._here
        if here.depth:
            here.depth -= 1
            if not here.depth:
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Here(threading.local):
    """Where this thread is; autograd runs backward passes in some of its own."""

    depth = 0
    """How many modules, one inside of the other, run in a context that the outermost has entered by itself."""
