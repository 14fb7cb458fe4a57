"""Files whose size and CRC-32 are known as soon as they are written, so that the manifest need not read them again."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.serialization import config

__all__ = ["Checksummed", "checksummed", "no_record_checksums"]

_option = getattr(config, "_config", {}).get("save.compute_crc32")
_OWN_OPTIONS = isinstance(getattr(_option, "user_override", None), ContextVar)
"""Whether each thread has options of its own. In older releases of torch all share them, and a checkpoint that another
thread writes at the same time would be left without checksums, too."""


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
def checksummed(file: Any) -> Iterator[Checksummed]:
    """Write to a file that is open for writing, from its beginning to its end."""
    stream = Checksummed(file)
    try:
        yield stream
    except Exception as e:
        if stream.error is None:
            raise
        raise stream.error from e  # torch makes a failed write an internal check that did not hold


class Checksummed(io.RawIOBase):
    """Writes to a file, and keeps the size and the CRC-32 of what was written so far."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file
        self.size = self.crc = 0
        self.error: Exception | None = None

    def write(self, data: Any) -> int:
        """Write bytes; returns how many, which is all of them."""
        self.crc = zlib.crc32(data, self.crc)
        try:
            self._file.write(data)
        except Exception as e:  # a remote file raises errors of many classes
            self.error = self.error or e
            raise
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()
