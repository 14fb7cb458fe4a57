"""Modules that know their device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

__all__ = ["DeviceDtypeModuleMixin"]


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
        self._follows = fn(self._follows)
        return super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
