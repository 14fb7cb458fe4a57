"""The precisions of DeepSpeed: its engine casts the weights, and keeps its own copy of them in single precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision.names import canonical_precision
from treadle_fabric.precision.precision import Precision, cast_floating, default_dtype, half_init

__all__ = ["DeepSpeedPrecision"]

_DTYPES: Final = {
    "32-true": torch.float32,
    "16-true": torch.float16,
    "16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
}


class DeepSpeedPrecision(Precision):
    """What DeepSpeed's engine needs around it: inputs in the dtype of the weights, outputs in torch's default dtype.

    In 16 bits the engine casts the weights and scales the loss; its optimizer steps a copy in single precision. So
    ``"16-true"`` and ``"16-mixed"`` train alike, and differ in the dtype in which modules are made; and the same for
    bfloat16.

    Args:
        precision: ``"32-true"``, ``"16-true"``, ``"16-mixed"``, ``"bf16-true"`` or ``"bf16-mixed"``, or a short name.

    Raises:
        MisconfigurationException: DeepSpeed has no such precision.
    """

    def __init__(self, precision: str | int | None) -> None:
        super().__init__()
        name = canonical_precision(precision)
        if name not in _DTYPES:
            raise MisconfigurationException(
                f"precision={name!r}, and DeepSpeed trains in {', '.join(map(repr, _DTYPES))}. Use one of these, or"
                " another strategy."
            )
        self.precision = name
        self.dtype = _DTYPES[name]
        self.converts = self.dtype is not torch.float32

    def convert_module(self, module: Module) -> Module:
        """Cast buffers to the dtype to which the engine casts the weights, as it leaves buffers alone.

        In a precision that ends in ``"-true"`` that is every buffer, and in a mixed one those of normalizations, which
        torch computes in one dtype only.
        """
        for each in module.modules() if self.converts else ():
            if self.precision.endswith("true") or isinstance(each, _NormBase):
                each._buffers.update(
                    {name: cast_floating(buffer, self.dtype) for name, buffer in each._buffers.items()}
                )
        return module

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new tensors have the half type, in a precision that ends in ``"-true"``."""
        return half_init(self.dtype) if self.converts and self.precision.endswith("true") else nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new weights have the half type, in a precision that ends in ``"-true"``."""
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return a context in which the half type is torch's default dtype, for tensors of the forward pass."""
        return default_dtype(self.dtype) if self.converts else nullcontext()

    def convert_input(self, data: Any) -> Any:
        """Cast floating-point tensors to the dtype of the weights."""
        return cast_floating(data, self.dtype)

    def convert_output(self, data: Any) -> Any:
        """Cast floating-point tensors to torch's default dtype."""
        return cast_floating(data, torch.get_default_dtype())
