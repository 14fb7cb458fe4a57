"""Read a part of a tensor from a file of a checkpoint folder, without reading the rest.

Each chunk of a tensor is an archive of ``torch.save`` that lies somewhere in a file. Its table of contents and its
pickle say where in it the numbers are, and in which order; the pickle is read by torch's restricted unpickler, with a
tensor without memory as the result. So the bytes of a part are read from their places straight into the tensor that
they are for. An archive that is different from what ``torch.save`` writes today is read whole.
"""

from __future__ import annotations

import ctypes
import io
import itertools
import pickle
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch import _weights_only_unpickler as restricted

from treadle_fabric.checkpoint.folder.source import FolderSource, Read
from treadle_fabric.checkpoint.torch_file import reason_of
from treadle_fabric.errors import CheckpointCorruptError, CheckpointError, CheckpointUnsafeError

__all__ = ["read_chunk"]

_AT_ONCE: Final = 8 * 1024 * 1024
"""Bytes that are read at a time where they cannot be read straight into their place."""
_PICKLE: Final = 64 * 1024
"""Bytes of a pickle that describes one tensor, at most."""
_WINDOW: Final = 8 * 1024
"""Bytes at both ends of an archive, in which all is that describes it."""
_HEADER: Final = struct.Struct("<26xHH")  # of a record: its last fields are the lengths of name and padding

Box = Sequence[tuple[int, int]]
"""Of each dimension where a part begins, and its size."""


class _Place(NamedTuple):
    """Where the numbers of a chunk lie in a file."""

    start: int
    """The byte of the first number."""
    dtype: torch.dtype
    strides: tuple[int, ...]


def read_chunk(source: FolderSource, entry: Mapping[str, Any], dtype: torch.dtype, box: Box, into: Tensor) -> None:
    """Copy a part of a chunk into a tensor of the part's shape, whose dtype and device may be others.

    Args:
        source: The folder.
        entry: The chunk, as the manifest has it.
        dtype: That of the tensor in the checkpoint.
        box: Which part of the chunk.
        into: What is filled.

    Raises:
        CheckpointCorruptError: The chunk is not what the manifest says.
        CheckpointUnsafeError: It holds other things than a tensor.
        CheckpointError: It cannot be read.
    """
    file, name = entry["file"], source.name
    try:
        with source.reading(file) as read:
            place = _find(read, entry, dtype)
            if place is not None:
                _copy(read, place, box, into, source.skipped)
                return
        whole = _load_whole(source, entry)
        if not isinstance(whole, Tensor) or list(whole.shape) != entry["sizes"] or whole.dtype != dtype:
            raise CheckpointCorruptError(f"{name!r} contradicts itself: a part of {file!r} is not what it should be.")
        into.copy_(whole[tuple(slice(start, start + size) for start, size in box)])
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as e:
        raise CheckpointUnsafeError(f"The checkpoint {name!r} could not be restored: {reason_of(e)}.") from e
    except Exception as e:
        raise CheckpointError(f"The checkpoint {name!r} could not be restored: {file!r}: {reason_of(e)}.") from e


def _load_whole(source: FolderSource, entry: Mapping[str, Any]) -> Any:
    content = io.BytesIO(source.read_range(entry["file"], entry["start"], entry["length"]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")  # what is damaged is an error anyway
        return torch.load(content, map_location="cpu", weights_only=True)


# --- where the numbers are ---


def _find(read: Read, entry: Mapping[str, Any], dtype: torch.dtype) -> _Place | None:
    """Where the numbers of a chunk are; None: the archive is one that has to be read whole."""
    if entry["length"] <= 4 * _WINDOW or sys.byteorder != "little":
        return None
    stream = _Window(read, entry["start"], entry["length"])
    try:
        with zipfile.ZipFile(stream) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            head = records["data.pkl"]
            if head.file_size > _PICKLE or any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
                return None
        order = _record(stream, records["byteorder"]) if "byteorder" in records else b"little"
        tensor, key = _described(_record(stream, head))
        numbers = records[f"data/{key}"]
        start = _begin(stream, numbers)
    except (zipfile.BadZipFile, KeyError, ValueError, NotImplementedError, RuntimeError, struct.error, EOFError):
        return None
    except pickle.UnpicklingError:
        return None  # reading it whole says why
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        return None
    size, strides, itemsize = list(tensor.shape), tensor.stride(), tensor.element_size()
    ends = (tensor.storage_offset() + _span(size, strides)) * itemsize
    if order != b"little" or size != entry["sizes"] or tensor.dtype != dtype or min(strides, default=0) < 0:
        return None
    if ends > numbers.file_size or start + numbers.file_size > entry["length"]:
        return None
    return _Place(entry["start"] + start + tensor.storage_offset() * itemsize, dtype, strides)


def _begin(stream: _Window, record: zipfile.ZipInfo) -> int:
    """Where in an archive the content of a record begins."""
    stream.seek(record.header_offset)
    name, padding = _HEADER.unpack(stream.read(_HEADER.size))
    return record.header_offset + _HEADER.size + int(name + padding)


def _record(stream: _Window, record: zipfile.ZipInfo) -> bytes:
    """The content of a small record. It has no checksum of its own: the manifest has one of the whole file."""
    stream.seek(_begin(stream, record))
    return stream.read(record.file_size)


def _described(data: bytes) -> tuple[Any, str]:
    """What a pickle describes, on the meta device, and the name of the storage that it lies in."""
    keys: list[str] = []

    def storage_of(saved: Any) -> Any:
        kind, storage_type, key, _, count = saved
        if kind not in ("storage", b"storage") or keys:
            raise ValueError("not one storage")
        keys.append(key)
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
        typed: Any = torch.storage.TypedStorage
        memory = torch.empty(count, dtype=dtype, device="meta").untyped_storage()
        return typed(wrap_storage=memory, dtype=dtype, _internal=True)

    unpickler: Any = restricted.Unpickler(io.BytesIO(data), encoding="utf-8")
    unpickler.persistent_load = storage_of
    return unpickler.load(), keys[0]


class _Window(io.RawIOBase):
    """A part of a file as a file. Its beginning and its end, which are asked for again and again, are read once."""

    def __init__(self, read: Read, start: int, length: int) -> None:
        super().__init__()
        self._read, self._start, self._length, self._position = read, start, length, 0
        self._ends = [(at, self._bytes(at, _WINDOW)) for at in (0, length - _WINDOW)]

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._length)[whence])
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._position)
        count = left if size is None or size < 0 else min(size, left)
        begin, self._position = self._position, self._position + count
        for at, known in self._ends:
            if at <= begin and begin + count <= at + len(known):
                return known[begin - at : begin - at + count]
        if count > 2 * _PICKLE:
            raise ValueError("a description is smaller")
        return self._bytes(begin, count)

    def _bytes(self, begin: int, count: int) -> bytes:
        found = bytearray(count)
        self._read(self._start + begin, memoryview(found))
        return bytes(found)


# --- reading the numbers ---


def _span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """From the first number of a part to behind the last one, in numbers; the part has one at least."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) if all(sizes) else 0


def _copy(read: Read, place: _Place, box: Box, into: Tensor, skipped: int) -> None:
    itemsize, strides = place.dtype.itemsize, place.strides
    offset = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    direct = into.device.type == "cpu" and into.dtype == place.dtype and type(into) is Tensor
    for at, part in _pieces(into, strides, _AT_ONCE // itemsize, skipped // itemsize, direct):
        begin, span = place.start + (offset + at) * itemsize, _span(part.shape, strides)
        if direct and _in_order(part, strides):
            read(begin, memory_of(part))
            continue
        buffer = torch.empty(span * itemsize, dtype=torch.uint8, device="cpu")
        read(begin, memory_of(buffer))
        part.copy_(buffer.view(place.dtype).as_strided(part.shape, strides))


def _in_order(part: Tensor, strides: Sequence[int]) -> bool:
    """Whether a part lies in memory as it does in the file, without gaps."""
    expected = 1
    for size, here, there in sorted(zip(part.shape, part.stride(), strides, strict=True), key=lambda each: each[2]):
        if size != 1 and not here == there == expected:
            return False
        expected *= size
    return True


def _pieces(
    into: Tensor, strides: Sequence[int], most: int, skipped: int, direct: bool
) -> Iterator[tuple[int, Tensor]]:
    """Cut a part into pieces that are read at once: where each begins, from the first number on, and what it fills.

    Args:
        into: What the part fills.
        strides: Those of the part in the file.
        most: Numbers that are read at a time, unless straight into their place.
        skipped: Numbers that are rather read in vain than to read once more.
        direct: Whether numbers can be read straight into their place.
    """
    if not into.numel():
        return
    span = 1
    cut: dict[int, int] = {}  # how many of a dimension are read at a time, where not all
    for dim in sorted((d for d, size in enumerate(into.shape) if size > 1), key=lambda d: strides[d]):
        stride = strides[dim]
        direct = direct and not cut and stride == into.stride(dim) == span
        if cut or stride - span > span + skipped:
            cut[dim] = 1
        elif not direct and (many := max(1, (most - span) // max(stride, 1) + 1)) < into.shape[dim]:
            cut[dim] = many
        else:
            span += (into.shape[dim] - 1) * stride
    for firsts in itertools.product(*(range(0, into.shape[dim], many) for dim, many in cut.items())):
        piece = into
        for (dim, many), first in zip(cut.items(), firsts, strict=True):
            piece = piece.narrow(dim, first, min(many, piece.shape[dim] - first))
        yield sum(first * strides[dim] for dim, first in zip(cut, firsts, strict=True)), piece


def memory_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to be written to."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
