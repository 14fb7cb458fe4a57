"""Write a file of the format safetensors: a header in JSON, and behind it the numbers of one tensor after the other.

The library of that name takes all tensors in memory. Here they are read in pieces of a few MB while they are written.
The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Final

import torch
from torch import Tensor

from treadle_fabric.checkpoint.stored.chunks import memory_of
from treadle_fabric.checkpoint.stored.regions import region
from treadle_fabric.errors import CheckpointError

__all__ = ["bytes_of", "check_dtypes", "write_safetensors"]

_NAMES: Final = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_AT_ONCE: Final = 8 * 1024 * 1024
"""Bytes of a tensor that are in memory at a time."""


def check_dtypes(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Raise a CheckpointError where a tensor is of a kind that the format does not know."""
    for name, tensor in tensors.items():
        kind = _dtype_in_file(tensor, dtype)
        if kind not in _NAMES or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"{name!r} has the dtype {kind} and the layout {tensor.layout}, which safetensors does not know. Give "
                "a dtype such as float32, or leave that tensor out of the state."
            )


def write_safetensors(
    file: IO[bytes], tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Write tensors to a file that is open for writing.

    Args:
        file: Where.
        tensors: By name; stored ones are read in pieces.
        dtype: What tensors of floating-point numbers become. None: what they are.
        metadata: Texts for the header.
    """
    # numbers of many bytes first, so that all lie at addresses that their size divides
    order = sorted(tensors, key=lambda name: (-_dtype_in_file(tensors[name], dtype).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + bytes_of(tensor, dtype)
        kind = _NAMES[_dtype_in_file(tensor, dtype)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in order:
        tensor = tensors[name]
        for part in _parts(tensor, [0] * tensor.dim(), list(tensor.shape), 0):
            values = part.to("cpu", _dtype_in_file(tensor, dtype)).resolve_conj().resolve_neg().contiguous()
            file.write(memory_of(values))


def bytes_of(tensor: Tensor, dtype: torch.dtype | None) -> int:
    """Bytes of a tensor in the file."""
    return tensor.numel() * _dtype_in_file(tensor, dtype).itemsize


def _dtype_in_file(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype


def _parts(source: Tensor, offsets: Sequence[int], sizes: Sequence[int], dim: int) -> Iterator[Tensor]:
    """A tensor in pieces, in the order of its numbers."""
    nbytes = math.prod(sizes) * source.element_size()
    if nbytes <= _AT_ONCE or dim == len(sizes):
        yield region(source, offsets, sizes)
        return
    many = max(1, _AT_ONCE * sizes[dim] // nbytes)
    for first in range(0, sizes[dim], many):
        at, size = list(offsets), list(sizes)
        at[dim], size[dim] = at[dim] + first, min(many, sizes[dim] - first)
        yield from _parts(source, at, size, dim + 1)
