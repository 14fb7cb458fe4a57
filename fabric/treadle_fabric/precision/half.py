"""True half precision: weights, inputs and computation in float16 or bfloat16."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch.nn import Module

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision.precision import Precision, cast_floating, cast_module, default_dtype, half_init

__all__ = ["HalfPrecision"]

_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


class HalfPrecision(Precision):
    """True half precision: everything in float16 or bfloat16, in half the memory of single precision, unscaled.

    Args:
        precision: ``"16-true"`` (default) or ``"bf16-true"``.

    Raises:
        MisconfigurationException: The name is another one.
    """

    converts = True

    def __init__(self, precision: Literal["16-true", "bf16-true"] = "16-true") -> None:
        super().__init__()
        if precision not in _DTYPES:
            raise MisconfigurationException(
                f"HalfPrecision(precision={precision!r}): must be one of {', '.join(map(repr, _DTYPES))}."
            )
        self.precision = precision
        self._dtype = _DTYPES[precision]

    def convert_module(self, module: Module) -> Module:
        """Cast the weights to the half type; complex ones stay complex64 or complex128."""
        return cast_module(module, self._dtype)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new tensors have the half type; complex ones are complex64."""
        return half_init(self._dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new tensors have the half type; complex ones are complex64."""
        return half_init(self._dtype)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return a context in which the half type is torch's default dtype, for tensors of the forward pass."""
        return default_dtype(self._dtype)

    def convert_input(self, data: Any) -> Any:
        """Cast floating-point tensors to the half type."""
        return cast_floating(data, self._dtype)

    def convert_output(self, data: Any) -> Any:
        """Cast floating-point tensors to torch's default dtype."""
        return cast_floating(data, torch.get_default_dtype())
