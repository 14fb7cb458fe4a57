"""Double precision: weights, inputs and computation in float64."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn import Module

from treadle_fabric.precision.precision import Precision, cast_floating, cast_module, default_dtype

__all__ = ["DoublePrecision"]


class DoublePrecision(Precision):
    """Double precision: everything in float64.

    Complex weights and inputs stay what they are, as under ``module.double()``: complex64 is not made complex128. New
    complex tensors are complex128.
    """

    precision = "64-true"
    converts = True

    def convert_module(self, module: Module) -> Module:
        """Cast the weights to float64."""
        return cast_module(module, torch.float64)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which float64 is torch's default dtype."""
        return default_dtype(torch.float64)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which float64 is torch's default dtype."""
        return default_dtype(torch.float64)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return a context in which float64 is torch's default dtype, for tensors that the forward pass creates."""
        return default_dtype(torch.float64)

    def convert_input(self, data: Any) -> Any:
        """Cast floating-point tensors to float64."""
        return cast_floating(data, torch.float64)

    def convert_output(self, data: Any) -> Any:
        """Cast floating-point tensors to torch's default dtype."""
        return cast_floating(data, torch.get_default_dtype())
