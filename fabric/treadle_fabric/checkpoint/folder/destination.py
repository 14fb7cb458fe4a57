"""Where the files of one save go: beside what has the name so far, until they take its place."""

from __future__ import annotations

import contextlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from treadle_fabric.checkpoint.folder.checksummed import checksummed
from treadle_fabric.checkpoint.folder.layout import MANIFEST, refuse_foreign
from treadle_fabric.checkpoint.folder.manifest import sync_folder
from treadle_fabric.checkpoint.folder.names import check_name
from treadle_fabric.checkpoint.folder.placing import lock_temporary, make_temporary, put_in_place
from treadle_fabric.errors import CheckpointError

__all__ = ["Destination", "LocalFolder"]


class Destination(ABC):
    """A folder in the making. Rank 0 begins it, publishes it and ends it; every rank writes files."""

    @abstractmethod
    def begin(self) -> str:
        """On rank 0: make room for files.

        Returns:
            What the other ranks need to know of it.

        Raises:
            CheckpointError: What has the name is no checkpoint.
        """

    @abstractmethod
    def follow(self, begun: str) -> None:
        """On every rank: take what :meth:`begin` returned on rank 0."""

    @property
    @abstractmethod
    def prefix(self) -> str:
        """What comes before the names of the files in the folder."""

    @abstractmethod
    def file(self, name: str) -> AbstractContextManager[Any]:
        """A new file, a :class:`Checksummed`, open for writing; at the end of the context it is stored."""

    @abstractmethod
    def publish(self, manifest: bytes, sizes: Mapping[str, int]) -> None:
        """On rank 0: give the name to what was written.

        Args:
            manifest: The content of the manifest.
            sizes: What the other files must have.

        Raises:
            CheckpointError: Not all files are to be seen here, or the name is another's.
            OSError: It failed. What had the name still has it.
        """

    @abstractmethod
    def end(self) -> None:
        """On rank 0: remove what was not published."""


class LocalFolder(Destination):
    """A hidden folder on a local disk, or on one that all machines share, which is renamed at the end.

    Args:
        path: The absolute path.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._temporary = ""
        self._lock: int | None = None

    def begin(self) -> str:
        check_name(self._path)
        refuse_foreign(self._path)
        self._temporary = make_temporary(self._path)
        self._lock = lock_temporary(self._temporary)
        return self._temporary

    def follow(self, begun: str) -> None:
        self._temporary = begun

    @property
    def prefix(self) -> str:
        return ""

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Any]:
        path = os.path.join(self._temporary, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "xb") as file, checksummed(file) as stream:
            yield stream
            file.flush()
            os.fsync(file.fileno())

    def publish(self, manifest: bytes, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            file = os.path.join(self._temporary, name)
            if not os.path.isfile(file) or os.path.getsize(file) != size:
                raise not_seen(name)
        with self.file(MANIFEST) as stream:
            stream.write(manifest)
        for folder in {os.path.dirname(os.path.join(self._temporary, name)) for name in (*sizes, MANIFEST)}:
            sync_folder(folder)
        put_in_place(self._temporary, self._path)

    def end(self) -> None:
        if self._temporary and os.path.isdir(self._temporary):
            shutil.rmtree(self._temporary, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def not_seen(name: str) -> CheckpointError:
    """The error for a file that a rank wrote and rank 0 does not see."""
    return CheckpointError(
        f"another rank wrote {name!r}, and here it is not to be seen. Save to a file system that all machines share."
    )
