"""True half precision: weights, inputs and computation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch.nn import Module

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision.precision import Precision, cast_floating, default_dtype

__all__ = ["HalfPrecision"]

_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


class HalfPrecision(Precision):
    """Everything in float16 or bfloat16; half the memory of single precision, and no scaling.

    Args:
        precision: ``"16-true"`` or ``"bf16-true"``.
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
        """Cast the weights."""
        return module.to(dtype=self._dtype)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """The half type as torch's default dtype."""
        return default_dtype(self._dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """The half type as torch's default dtype."""
        return default_dtype(self._dtype)

    def forward_context(self) -> AbstractContextManager[Any]:
        """The half type as torch's default dtype, for tensors that the forward pass creates."""
        return default_dtype(self._dtype)

    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors in the half type."""
        return cast_floating(data, self._dtype)

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors in torch's default dtype."""
        return cast_floating(data, torch.get_default_dtype())
