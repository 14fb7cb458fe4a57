"""Modules that know their device and dtype, also without parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

__all__ = ["DeviceDtypeModuleMixin", "as_moved"]


def as_moved(move: Callable[[Tensor], Tensor], before: Tensor | None) -> Tensor:
    """What a module without parameters has in their place: an empty tensor, moved and converted as they would be.

    Args:
        move: What ``Module.to`` and its like do with each parameter.
        before: The empty tensor so far. Default: one on the CPU, of torch's default dtype.
    """
    if before is None:
        return move(torch.empty(0)).detach()
    try:
        return move(before).detach()
    except NotImplementedError:  # from the meta device to a real one
        return move(torch.empty(0, dtype=before.dtype)).detach()


class DeviceDtypeModuleMixin(Module):
    """A module with the attributes ``device`` and ``dtype``, also where the module has no parameters.

    They are those that ``to``, ``cuda``, ``half`` and the like gave last, to this module or to one around it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._follows = torch.empty(0)  # no buffer: no part of the state dict

    @property
    def device(self) -> torch.device:
        """The device."""
        return self._follows.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of floating-point parameters."""
        return self._follows.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        self._follows = as_moved(fn, self._follows)
        return super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
