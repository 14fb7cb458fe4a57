"""What ranks exchange by ``all_gather`` and ``all_reduce``: numbers and arrays in any containers, as tensors."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Set
from numbers import Number
from typing import Any, Final

import torch
from torch import Tensor

from treadle_fabric.containers import children, leaves_by_path, map_leaves
from treadle_fabric.errors import MisconfigurationException

__all__ = ["as_tensors"]

_PLAIN: Final = (bool, int, float, complex)


class _RefusedError(Exception):
    """A leaf that cannot be exchanged, and why."""


def as_tensors(
    data: Any, device: torch.device, method: str, reduction: Callable[[torch.dtype], object] | None = None
) -> Any:
    """Make tensors of the numbers and arrays in a value.

    Args:
        data: Tensors, numbers of Python and NumPy, and arrays, in any containers. A DTensor is made whole.
        device: Where the new tensors are; a tensor stays where it is.
        method: What is called, for an error.
        reduction: Where everything must be a number, gets each dtype, and raises a MisconfigurationException where
            numbers of a dtype cannot be reduced. Default: other values, such as strings and None, stay as they are.

    Returns:
        The same structure; a container in which nothing changed is the same object.

    Raises:
        MisconfigurationException: Something cannot be exchanged; the error says where it is.
    """
    kind = type(data)
    if kind is list or kind is tuple or kind is dict:
        found = data.values() if kind is dict else data
        if all(map(_is_plain, found)) and (reduction is None or all(each.dtype.is_floating_point for each in found)):
            return data
    elif _is_plain(data):
        return data

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Set):
            raise _RefusedError("has no order, by which the ranks' values would belong together: pass a sorted list")
        if isinstance(leaf, torch.Size):  # which holds integers only, and the exchanged ones are tensors
            return tuple(map(convert, leaf))
        tensor = _exchanged(leaf) if isinstance(leaf, Tensor) else _tensor_of(leaf, device)
        if reduction is None:
            return leaf if tensor is None else tensor
        if tensor is None:
            raise _RefusedError(
                "is no number. Pass tensors, numbers and arrays only; all_gather takes other values, too, and"
                " treadle_fabric.all_gather_objects(fabric, value) exchanges objects of any kind"
            )
        try:
            reduction(tensor.dtype)
        except MisconfigurationException as error:
            raise _RefusedError(f"cannot be reduced: {str(error).rstrip('.')}") from None
        return tensor

    try:
        return map_leaves(data, convert, _is_leaf)
    except _RefusedError as refused:
        path, leaf = next(found for found in leaves_by_path(data, _is_set) if _refuses(convert, found[1]))
        of = f" of dtype {leaf.dtype}" if hasattr(leaf, "dtype") else ""
        where = f"data{path} ({type(leaf).__name__}{of})"
        raise MisconfigurationException(f"{method}: {where} {refused}.") from None


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor that ranks exchange as it is; True for most, and quickly found out."""
    return (
        type(value) is Tensor
        and value.layout is torch.strided
        and not (value.is_meta or value.is_quantized or value.is_nested or value.is_conj() or value.is_neg())
    )


def _is_set(value: Any) -> bool:
    return isinstance(value, Set)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, (Set, torch.Size)) or children(value) is None


def _refuses(convert: Callable[[Any], Any], leaf: Any) -> bool:
    try:
        convert(leaf)
    except _RefusedError:
        return True
    return False


def _exchanged(tensor: Any) -> Tensor:
    if tensor.is_meta:
        raise _RefusedError("is on the meta device, and has no values")
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise _RefusedError(f"is {kind}: ranks exchange dense tensors, such as to_dense() or to_padded_tensor() gives")
    if tensor.is_quantized:
        raise _RefusedError("is quantized: pass its dequantize()")
    if type(tensor).__name__ == "MaskedTensor":
        raise _RefusedError("has a mask, which ranks do not exchange: pass its to_tensor(value)")
    if hasattr(tensor, "full_tensor"):  # a DTensor, such as the norm of a parameter: its ranks have the whole together
        tensor = tensor.full_tensor()
    exchanged: Tensor = tensor.resolve_conj().resolve_neg()
    return exchanged


def _tensor_of(value: Any, device: torch.device) -> Tensor | None:
    """A number or an array as a tensor; None for anything else."""
    kind = type(value)
    if kind in _PLAIN:
        try:
            return torch.tensor(value, device=device)
        except (RuntimeError, OverflowError, ValueError):
            raise _RefusedError("is too large for an integer of 64 bits: pass a float") from None
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return _tensor_of_array(numpy, value, device)
    if kind is array:
        return _tensor_of_row(value, device)
    if hasattr(kind, "__array__") and numpy is not None:  # of another library: a column of a table, say
        return _tensor_of_array(numpy, numpy.asarray(value), device)
    if isinstance(value, _PLAIN):  # of a class of the user's, or an enum
        plain: Any = next(each for each in _PLAIN if isinstance(value, each))
        return torch.tensor(plain(value), device=device)
    if isinstance(value, Number):  # a Fraction or a Decimal, say
        try:
            return torch.tensor(float(value), device=device)  # type: ignore[arg-type]
        except TypeError:
            return None
    return None


def _tensor_of_row(value: Any, device: torch.device) -> Tensor | None:
    """The numbers of a row of Python's module ``array``; None for one of characters."""
    if value.typecode not in "bBhHiIlLqQfd":
        return None
    dtype = {"f": torch.float32, "d": torch.float64}.get(value.typecode, torch.int64)
    try:
        return torch.tensor(value.tolist(), dtype=dtype, device=device)
    except (RuntimeError, OverflowError, ValueError):
        raise _RefusedError("has numbers that are too large for an integer of 64 bits: pass floats") from None


def _tensor_of_array(numpy: Any, value: Any, device: torch.device) -> Tensor | None:
    if isinstance(value, (numpy.str_, numpy.bytes_)):
        return None
    if isinstance(value, numpy.ma.MaskedArray):
        raise _RefusedError("has a mask, which a tensor has not: pass its filled(...)")
    array = numpy.array(value, dtype=value.dtype.newbyteorder("="), order="C", subok=False)
    try:
        return torch.from_numpy(array).to(device)
    except TypeError:
        raise _RefusedError(
            "has a dtype that torch has not. Convert it to a number's, with .astype(...), or exchange it with"
            " treadle_fabric.all_gather_objects(fabric, value)"
        ) from None
