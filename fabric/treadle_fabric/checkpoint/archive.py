"""Find out what a file is, without running anything that it holds."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import IO, Any, NamedTuple

import torch

from treadle_fabric.checkpoint.seal import seal_is_broken
from treadle_fabric.errors import CheckpointCorruptError, CheckpointUnsafeError

__all__ = ["Archive", "check_archive", "forbidden_globals", "numpy_allowed", "state_path_of", "weights_only_reason"]

_ZIP = b"PK\x03\x04"
_LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # how torch.save began before 1.6
_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer: the file itself was never fetched (`git lfs pull`)",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array file",
    b"\x1f\x8b": "gzip-compressed",
    b"\x28\xb5\x2f\xfd": "zstandard-compressed",
    b"BZh": "bzip2-compressed",
    b"7z\xbc\xaf": "a 7z archive",
    b"<!DOCTYPE": "a web page, perhaps an error page that was saved as a download",
    b"<html": "a web page, perhaps an error page that was saved as a download",
}
_CHUNK = 4 * 1024 * 1024


class Archive(NamedTuple):
    """What a file of a checkpoint is."""

    is_zip: bool
    """A zip archive; else of the format that torch had before it."""
    stored: bool
    """Its records are as they are in memory, not compressed."""


def check_archive(file: IO[bytes], path: str, *, every_byte: bool = True) -> Archive:
    """Make sure that ``file`` is a whole checkpoint.

    Args:
        file: Open, at its beginning.
        path: What the user calls it.
        every_byte: Read all of it; False: only the headers and the table of contents, where the rest is known to be
            right.

    Raises:
        CheckpointCorruptError: It is damaged, cut off, or no checkpoint.
        CheckpointUnsafeError: It is a bare pickle that would run code.
    """
    head = file.read(64)
    if head.startswith(_ZIP):
        return Archive(True, _check_zip(file, path, every_byte))
    if head.startswith(_LEGACY):
        return Archive(False, False)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not size:
        raise CheckpointCorruptError(f"{path!r} is empty: the program that wrote it was stopped, or the disk was full.")
    for magic, kind in _FOREIGN.items():
        if head.startswith(magic):
            raise CheckpointCorruptError(f"{path!r} is no checkpoint but {kind}.")
    if not head.strip(b"\0"):
        raise CheckpointCorruptError(
            f"{path!r} begins with zeros only: it was not written to the end. Use another one."
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        raise CheckpointCorruptError(f"{path!r} is a safetensors file. Load it with `safetensors.torch.load_file`.")
    names = _globals_of_pickle(file)
    if names is None:
        raise CheckpointCorruptError(
            f"{path!r} is no checkpoint, or its beginning is damaged: its {size} bytes start with {head[:8]!r}, and a "
            f"checkpoint starts with {_ZIP!r}. Use another one."
        )
    if names:
        raise CheckpointUnsafeError(
            f"{path!r} was not loaded: it is a bare pickle, no checkpoint, and unpickling it would call "
            f"{', '.join(names)}. If you trust its author, open it yourself and `torch.save` the tensors."
        )
    raise CheckpointCorruptError(f"{path!r} is a bare pickle, no checkpoint. Write its contents with `torch.save`.")


def _check_zip(file: IO[bytes], path: str, every_byte: bool) -> bool:
    """Raise where something is wrong; return whether nothing in the archive is compressed."""
    size = file.seek(0, os.SEEK_END)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as e:
        raise CheckpointCorruptError(
            f"{path!r} is truncated: the table of contents at its end is missing ({size} bytes are there). The copy or "
            "the save was cut off. Use another checkpoint."
        ) from e
    with archive:
        if seal_is_broken(file, archive):
            raise CheckpointCorruptError(
                f"{path!r} is damaged: the checksum of its headers and its table of contents is wrong. The disk or a "
                "copy changed it. Use another checkpoint."
            )
        names = {name.partition("/")[2] for name in archive.namelist()}
        if "data.pkl" not in names:
            some = ", ".join(archive.namelist()[:3])
            raise CheckpointCorruptError(f"{path!r} is a zip archive, no checkpoint (it holds {some or 'nothing'}).")
        if "constants.pkl" in names:
            raise CheckpointCorruptError(f"{path!r} is a TorchScript archive. Load it with `torch.jit.load`.")
        for record in archive.infolist() if every_byte else ():
            _check_record(archive, record, path)
        return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())


def _check_record(archive: zipfile.ZipFile, record: zipfile.ZipInfo, path: str) -> None:
    """Compare a checksum: torch writes checksums and never reads them, so a flipped bit would reach the weights."""
    if not record.CRC:  # written with torch.serialization.set_crc32_options(False)
        return
    try:
        with archive.open(record) as stream:
            while stream.read(_CHUNK):
                pass
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as e:
        raise CheckpointCorruptError(
            f"{path!r} is damaged: the checksum of its record {record.filename!r} is wrong. The disk or a copy changed "
            "it. Use another checkpoint."
        ) from e


def _globals_of_pickle(file: IO[bytes]) -> list[str] | None:
    """The names that a pickle would import, read from its opcodes; None if it is no pickle."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    found: dict[str, None] = {}
    try:
        for op, arg, _ in pickletools.genops(file):
            if op.name in ("GLOBAL", "INST"):
                found[str(arg).replace(" ", ".")] = None
            elif op.name == "STACK_GLOBAL":
                found[".".join(strings[-2:])] = None
            elif op.name == "MEMOIZE":
                memo[len(memo)] = strings[-1] if strings else ""
            elif op.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[int(str(arg))] = strings[-1] if strings else ""
            elif op.name in ("GET", "BINGET", "LONG_BINGET"):
                strings.append(memo.get(int(str(arg)), ""))
            elif isinstance(arg, str):
                strings.append(arg)
    except Exception:
        return list(found) or None  # damaged further on, or no pickle at all
    return list(found)


def forbidden_globals(file: IO[bytes], is_zip: bool, error: Exception) -> list[str]:
    """The names in a checkpoint that ``weights_only=True`` refuses; ``error`` is what it said."""
    file.seek(0)
    try:
        if is_zip:
            with numpy_allowed():
                return list(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        for _ in range(5):  # the older format is five pickles, and the bytes of the tensors
            list(pickletools.genops(file))
    except Exception:  # cut off, so that a name in what torch says could be half of one
        return []
    return re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]


def numpy_allowed() -> AbstractContextManager[Any]:
    """Let ``weights_only=True`` accept NumPy's numbers and arrays: they hold plain data, and run nothing."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return nullcontext()
    module = sys.modules.get("numpy._core.multiarray") or sys.modules["numpy.core.multiarray"]  # NumPy 2, or 1
    kinds = {type(numpy.dtype(code)) for code in "?bBhHiIlLqQefdgFDG"}
    parts = {numpy.ndarray, numpy.dtype, module.scalar, module._reconstruct, *kinds}
    return torch.serialization.safe_globals(list(parts.difference(torch.serialization.get_safe_globals())))


def weights_only_reason(error: Exception) -> str:
    """The reason in an error of torch's restricted unpickler, without the advice around it."""
    text = str(error)
    reason = text.partition("WeightsUnpickler error:")[2] or text.partition("\n")[0]
    return reason.strip().partition("\n")[0].rstrip(". ")


def state_path_of(state: Any, path: str = "state") -> str:
    """Find the entry of a nested state that cannot be pickled."""
    items: list[tuple[Any, Any]] = []
    if isinstance(state, Mapping):
        items = list(state.items())
    elif isinstance(state, list | tuple):
        items = list(enumerate(state))
    for key, value in items:
        if isinstance(value, torch.Tensor):
            continue
        try:
            pickle.dumps(value)
        except Exception:
            return state_path_of(value, f"{path}[{key!r}]")
    return f"{path} (a {type(state).__qualname__})"
