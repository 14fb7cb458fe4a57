"""What a reduction makes of each dtype, in one process as in several."""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from treadle_fabric.errors import MisconfigurationException, near_names

__all__ = ["Reduction", "check_reduce_op", "reduction_of"]

_NAMES: Final = ("mean", "avg", "sum", "max", "min", "product")
_ORDERED: Final = ("MIN", "MAX")
_SMALL: Final = {
    torch.bool: torch.uint8,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
}
"""Dtypes that backends do not reduce, and those that hold the same numbers."""


class Reduction:
    """A reduction of tensors of one dtype over processes.

    Numbers come out as ``torch.mean``, ``torch.sum``, ``torch.prod``, ``torch.amin`` and ``torch.amax`` give them, so
    that nothing overflows: a mean of integers or bools has torch's default dtype, a sum or product of them is
    ``int64``. Everything else keeps its dtype.

    Args:
        reduce_op: ``"mean"`` (or ``"avg"``), ``"sum"``, ``"max"``, ``"min"``, ``"product"``, or a
            ``torch.distributed.ReduceOp``.
        dtype: Of the tensors.

    Raises:
        MisconfigurationException: There is no such reduction, or none of numbers of this dtype.
    """

    def __init__(self, reduce_op: Any, dtype: torch.dtype) -> None:
        name = check_reduce_op(reduce_op)
        self.result = dtype
        """The dtype of the result."""
        self._mean = name in ("MEAN", "AVG")
        self.op: Any = dist.ReduceOp.SUM if self._mean else getattr(dist.ReduceOp, name, reduce_op)
        """What ``torch.distributed`` is asked for."""
        fractional = dtype.is_floating_point or dtype.is_complex
        if self._mean:
            self.result = dtype if fractional else torch.get_default_dtype()
        elif name in ("SUM", "PRODUCT"):
            self.result = dtype if fractional else torch.int64
        # A sum could be more than the largest number, 65504
        self._divides_first = self._mean and self.result is torch.float16
        if dtype.is_complex and name not in ("MEAN", "AVG", "SUM"):
            raise MisconfigurationException(
                f"reduce_op={name.lower()!r} has no meaning for complex numbers ({dtype}), which have a mean and a sum"
                " only: reduce their absolute values, or the real and imaginary parts."
            )
        if dtype is torch.uint64 and name in _ORDERED:
            raise MisconfigurationException(
                f"reduce_op={name.lower()!r} is not there for {dtype}: convert the tensor to torch.int64."
            )
        if dtype.is_floating_point and name in ("BAND", "BOR", "BXOR"):
            raise MisconfigurationException(f"reduce_op={name} combines bits, and {dtype} is no integer.")

    def alone(self, tensor: Tensor) -> Tensor:
        """The result where there is one process: the tensor itself, if its dtype is that of the result."""
        return tensor.to(self.result)

    def begin(self, tensor: Tensor, size: int) -> Tensor:
        """What this process contributes.

        Args:
            tensor: The tensor of this process.
            size: The number of processes.
        """
        dtype = self.result  # and not that of the tensor, which may be another one on another rank
        tensor = tensor.to(dtype)
        if dtype.is_complex and dtype.itemsize < 8:
            tensor = tensor.to(torch.complex64)
        if dtype.is_floating_point and dtype.itemsize == 1:
            tensor = tensor.float()
        if self._divides_first:
            return tensor / size
        return tensor.to(_SMALL.get(dtype, tensor.dtype))

    def end(self, reduced: Tensor, size: int) -> Tensor:
        """The result, of what came of :meth:`begin`."""
        if self._mean and not self._divides_first:
            reduced /= size
        return reduced.to(self.result)


def reduction_of(reduce_op: Any, dtype: torch.dtype) -> Reduction:
    """The :class:`Reduction` of these arguments, made once for each name and dtype."""
    if isinstance(reduce_op, str):
        return _named(reduce_op, dtype, torch.get_default_dtype())
    return Reduction(reduce_op, dtype)


@functools.lru_cache(256)
def _named(reduce_op: str, dtype: torch.dtype, default: torch.dtype) -> Reduction:
    return Reduction(reduce_op, dtype)


def check_reduce_op(reduce_op: Any) -> str:
    """The name of a reduction, in upper case.

    Raises:
        MisconfigurationException: There is no such reduction; the error has the names that are near.
    """
    if isinstance(reduce_op, str):
        if reduce_op.lower() not in _NAMES:
            raise MisconfigurationException(f"reduce_op={reduce_op!r} is unknown. {near_names(reduce_op, _NAMES)}")
        return reduce_op.upper()
    for name in ("AVG", "SUM", "MIN", "MAX", "PRODUCT", "BAND", "BOR", "BXOR"):
        if reduce_op == getattr(dist.ReduceOp, name):
            return name
    if type(reduce_op) is dist.ReduceOp:  # such as a sum with a factor, which its bare name lacks
        return "OTHER"
    raise MisconfigurationException(
        f"reduce_op={reduce_op!r} is no reduction: give one of {', '.join(_NAMES)}, or a torch.distributed.ReduceOp."
    )
