"""Where the files of a checkpoint folder are read from: a local disk, or a file system behind a URL."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Final

from treadle_fabric.checkpoint.folder.layout import MANIFEST, identity

__all__ = ["FolderSource", "LocalSource", "RemoteSource"]

Read = Callable[[int, memoryview], None]
_CHUNK: Final = 4 * 1024 * 1024
_FETCHED: Final = 32 * 1024 * 1024
"""Bytes that are fetched from afar at a time, because they are in memory twice for a moment."""


class FolderSource(ABC):
    """The files of one checkpoint folder, read by their names in the manifest.

    Args:
        name: What the user calls the folder.
    """

    skipped: ClassVar[int]
    """Bytes that are read in vain rather than to ask a second time for what lies behind them."""
    prefix: str = ""
    """What comes before the name of each file but the manifest; the manifest says it."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def path_of(self, file: str) -> str:
        """The path or URL of a file."""

    @abstractmethod
    def identity(self) -> tuple[int, ...] | None:
        """Which checkpoint lies here now; None: there is none."""

    @abstractmethod
    def size(self, file: str) -> int:
        """Bytes of a file.

        Raises:
            OSError: There is no such file, or it cannot be reached. The other methods raise it, too.
        """

    @abstractmethod
    def reading(self, file: str) -> contextlib.AbstractContextManager[Read]:
        """Give a function that fills a buffer with the bytes from a position on.

        The function raises an EOFError where the file ends before.
        """

    def read(self, file: str) -> bytes:
        """The content of a file."""
        return self.read_range(file, 0, self.size(file))

    def read_range(self, file: str, start: int, length: int) -> bytes:
        """``length`` bytes of a file from ``start`` on."""
        found = bytearray(length)
        with self.reading(file) as read:
            read(start, memoryview(found))
        return bytes(found)

    def parts(self, file: str) -> Iterator[memoryview]:
        """The content of a file in parts of a few MB, each valid until the next is asked for."""
        size, buffer = self.size(file), memoryview(bytearray(_CHUNK))
        with self.reading(file) as read:
            for start in range(0, size, _CHUNK):
                part = buffer[: min(_CHUNK, size - start)]
                read(start, part)
                yield part


class LocalSource(FolderSource):
    """A folder on a disk of this machine, or on one that is mounted.

    Args:
        path: Where it is.
        name: What the user calls it.
    """

    skipped = 64 * 1024

    def __init__(self, path: str, name: str) -> None:
        super().__init__(name)
        self.path = path

    def path_of(self, file: str) -> str:
        return os.path.join(self.path, file if file == MANIFEST else self.prefix + file)

    def identity(self) -> tuple[int, ...] | None:
        return identity(self.path)

    def size(self, file: str) -> int:
        return os.stat(self.path_of(file)).st_size

    @contextlib.contextmanager
    def reading(self, file: str) -> Iterator[Read]:
        with open(self.path_of(file), "rb", buffering=0) as opened:

            def read(start: int, into: memoryview) -> None:
                opened.seek(start)
                while into:
                    count = opened.readinto(into)
                    if not count:
                        raise EOFError(f"{file!r} ends before byte {start + len(into)}")
                    into = into[count:]

            yield read


class RemoteSource(FolderSource):
    """A folder behind a URL.

    Args:
        fs: The fsspec file system.
        path: Where the folder is in it.
        url: What the user calls it.
    """

    skipped = 4 * 1024 * 1024

    def __init__(self, fs: Any, path: str, url: str) -> None:
        super().__init__(url)
        self._fs, self._path = fs, path.rstrip("/")

    def path_of(self, file: str) -> str:
        return f"{self.name.rstrip('/')}/{self._name_of(file)}"

    def identity(self) -> tuple[int, ...] | None:
        """The first line of the manifest has the checksum of the rest, which has the checksums of all files."""
        try:
            return tuple(self._fs.cat_file(f"{self._path}/{MANIFEST}", start=0, end=32))
        except OSError:
            return None

    def size(self, file: str) -> int:
        self._fs.invalidate_cache(self._path)  # another machine may have written since
        return int(self._fs.info(f"{self._path}/{self._name_of(file)}")["size"])

    @contextlib.contextmanager
    def reading(self, file: str) -> Iterator[Read]:
        path = f"{self._path}/{self._name_of(file)}"

        def read(start: int, into: memoryview) -> None:
            for at in range(0, len(into), _FETCHED):
                part = into[at : at + _FETCHED]
                found = self._fs.cat_file(path, start=start + at, end=start + at + len(part))
                if len(found) != len(part):
                    raise EOFError(f"{file!r} ends before byte {start + len(into)}")
                part[:] = found

        yield read

    def _name_of(self, file: str) -> str:
        return file if file == MANIFEST else self.prefix + file
