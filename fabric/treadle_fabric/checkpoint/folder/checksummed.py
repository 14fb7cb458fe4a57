"""Files whose size and CRC-32 are known as soon as they are written, so that the manifest need not read them again."""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.serialization import config

__all__ = ["checksummed_file", "no_record_checksums", "save_checksummed"]

_option = getattr(config, "_config", {}).get("save.compute_crc32")
_OWN_OPTIONS = isinstance(getattr(_option, "user_override", None), ContextVar)
"""Whether each thread has options of its own. In older releases of torch all share them, and a checkpoint that another
thread writes at the same time would be left without checksums, too."""


def save_checksummed(content: Any, path: str) -> tuple[int, int]:
    """``torch.save`` to a new file, flushed to the disk; returns its size and CRC-32."""
    with checksummed_file(path, "xb") as stream, no_record_checksums():
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    return stream.size, stream.crc


@contextlib.contextmanager
def no_record_checksums() -> Iterator[None]:
    """``torch.save`` computes no checksum of each record inside: the manifest has one of every byte of the file."""
    before = torch.serialization.get_crc32_options()
    if _OWN_OPTIONS:
        torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        if _OWN_OPTIONS:
            torch.serialization.set_crc32_options(before)


@contextlib.contextmanager
def checksummed_file(path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
    """A local file, open for writing from its beginning to its end."""
    with open(path, mode) as file:
        stream = _Checksummed(file)
        try:
            yield stream
        except Exception as e:
            if stream.error is None:
                raise
            raise stream.error from e  # torch makes a failed write an internal check that did not hold


class _Checksummed(io.RawIOBase):
    """Writes to a file, and keeps the size and the CRC-32 of what was written so far."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file
        self.size = self.crc = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        try:
            self._file.write(data)
        except OSError as e:
            self.error = self.error or e
            raise
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        self._file.flush()
        return int(self._file.fileno())
