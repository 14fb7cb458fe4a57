"""Precision on devices of XLA: the dtype of weights, inputs and computation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal

import torch
from torch.nn import Module

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision.precision import Precision, cast_floating, cast_module, default_dtype, half_init

__all__ = ["XLAPrecision"]

_DTYPES: Final = {"32-true": torch.float32, "16-true": torch.float16, "bf16-true": torch.bfloat16}


class XLAPrecision(Precision):
    """Everything in one dtype on devices of XLA: float32, float16 or bfloat16, unscaled.

    Args:
        precision: ``"32-true"`` (default), ``"16-true"`` or ``"bf16-true"``.

    Raises:
        MisconfigurationException: The name is another one.
    """

    def __init__(self, precision: Literal["32-true", "16-true", "bf16-true"] = "32-true") -> None:
        super().__init__()
        if precision not in _DTYPES:
            raise MisconfigurationException(
                f"XLAPrecision(precision={precision!r}): must be one of {', '.join(map(repr, _DTYPES))}."
            )
        self.precision = precision
        self._dtype = _DTYPES[precision]
        self._halves = self._dtype is not torch.float32
        self.converts = self._halves

    def convert_module(self, module: Module) -> Module:
        """Cast the weights to the half type, if there is one; complex ones stay complex."""
        return cast_module(module, self._dtype) if self._halves else module

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new tensors have the dtype."""
        return half_init(self._dtype) if self._halves else nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which the weights of new modules have the dtype."""
        return half_init(self._dtype) if self._halves else nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return a context in which the half type is torch's default dtype, for tensors of the forward pass."""
        return default_dtype(self._dtype) if self._halves else nullcontext()

    def convert_input(self, data: Any) -> Any:
        """Cast floating-point tensors to the half type."""
        return cast_floating(data, self._dtype) if self._halves else data

    def convert_output(self, data: Any) -> Any:
        """Cast floating-point tensors to torch's default dtype."""
        return cast_floating(data, torch.get_default_dtype()) if self._halves else data
