"""Torch functions that mean something else while a model runs in parallel: attention, dropout, cross entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

__all__ = ["Substitution"]


class Substitution(TorchFunctionMode):
    """A context in which some functions of torch are others, with the same arguments.

    A strategy enters it around the forward pass, so that models call ``F.scaled_dot_product_attention`` and
    ``F.cross_entropy`` as ever, and around the backward pass, where activation checkpointing runs parts of the forward
    pass again. Inside a substitute the functions are torch's own.

    Args:
        substitutes: For functions of torch, what is called in their place.
    """

    def __init__(self, substitutes: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._substitutes = dict(substitutes)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return self._substitutes.get(func, func)(*args, **(kwargs or {}))
