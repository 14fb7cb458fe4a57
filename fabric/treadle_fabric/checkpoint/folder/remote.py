"""Checkpoint folders on remote file systems, which have no locks and cannot rename a folder in one step.

Each save puts its files into a folder of its own below the URL of the checkpoint, the *prefix*. The manifest lies at
the URL itself and names the prefix; it is written last, in one step, and with it the new files take the place of the
old ones. Where the URL is also the key of a single file, as object stores allow, the manifest counts.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Final

from treadle_fabric.checkpoint.folder.checksummed import checksummed
from treadle_fabric.checkpoint.folder.destination import Destination, not_seen
from treadle_fabric.checkpoint.folder.layout import HEAD, MANIFEST, PART
from treadle_fabric.checkpoint.folder.manifest import prefix_in
from treadle_fabric.checkpoint.folder.names import hidden_beside
from treadle_fabric.errors import CheckpointError

__all__ = [
    "RemoteFolder",
    "exists_remote",
    "manifest_at",
    "modified",
    "put",
    "refuse_foreign_remote",
    "remove_folder_beside",
    "remove_remote",
]
_STORES_WITH_ATOMIC_PUT = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"})
"""An upload to these becomes visible when it is complete; elsewhere a half-written file would show."""
_OWN: Final = re.compile(r"[0-9a-f]{32}")
"""The name of the folder that a save has of its own."""
_STALE_NS: Final = 6 * 3600 * 10**9
_NEIGHBOURS: Final = 256
"""So many neighbours of a checkpoint are looked at for what dead saves left, once a process."""


class RemoteFolder(Destination):
    """A prefix below a URL, which the manifest at the URL names in the end.

    Args:
        fs: The fsspec file system.
        where: The path in it.
        url: What the user calls it.
    """

    def __init__(self, fs: Any, where: str, url: str) -> None:
        self._fs, self._where, self._url = fs, where.rstrip("/"), url
        self._own = ""
        self._published = False

    def begin(self) -> str:
        self._fs.invalidate_cache()
        refuse_foreign_remote(self._fs, self._where, self._url)
        if not _has_keys(self._fs) and self._fs.isfile(self._where):
            raise CheckpointError(
                f"a file lies at {self._url!r}, and this file system cannot replace a file by a folder in one step. "
                "Remove the file, or choose another name."
            )
        self._own = uuid.uuid4().hex
        self._fs.makedirs(f"{self._where}/{self._own}", exist_ok=True)
        return self._own

    def follow(self, begun: str) -> None:
        self._own = begun

    @property
    def prefix(self) -> str:
        return f"{self._own}/"

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Any]:
        file = self._fs.open(f"{self._where}/{self._own}/{name}", "wb")
        try:
            with checksummed(file) as stream:
                yield stream
        except BaseException:
            with contextlib.suppress(Exception):
                file.discard()  # closing it would store what was written so far
            with contextlib.suppress(Exception):
                file.closed = True  # else it is closed when nobody refers to it any more
            raise
        file.close()

    def publish(self, manifest: bytes, sizes: Mapping[str, int]) -> None:
        self._fs.invalidate_cache()
        found = {_base(entry): entry["size"] for entry in self._fs.ls(f"{self._where}/{self._own}", detail=True)}
        for name, size in sizes.items():
            if found.get(name) != size:
                raise not_seen(name)
        before = manifest_at(self._fs, self._where)
        try:
            put(self._fs, f"{self._where}/{MANIFEST}", manifest)
        except BaseException:
            # A store may have taken the manifest though its answer was lost; then the files have to stay
            self._published = True
            if prefix_in(manifest_at(self._fs, self._where) or b"") != self.prefix:
                self._published = False
                raise
        self._published = True
        with contextlib.suppress(Exception):  # what stays is removed by a later save
            self._tidy(None if before is None else prefix_in(before))

    def end(self) -> None:
        if self._own and not self._published:
            with contextlib.suppress(Exception):
                self._fs.rm(f"{self._where}/{self._own}", recursive=True)

    def _tidy(self, replaced: str | None) -> None:
        """Remove the files of the checkpoint that was replaced, and what saves left that died hours ago."""
        fs, where = self._fs, self._where
        fs.invalidate_cache()
        now = modified(fs, f"{where}/{MANIFEST}")  # by the clock that the others were written by
        for entry in fs.ls(where, detail=True):
            name = _base(entry)
            if entry["type"] == "directory":
                if f"{name}/" == replaced or (name != self._own and _is_stale(fs, f"{where}/{name}", now)):
                    fs.rm(f"{where}/{name}", recursive=True)
            elif PART.fullmatch(name) and name != MANIFEST and replaced is not None:
                fs.rm_file(f"{where}/{name}")
        if _has_keys(fs) and fs.isfile(where):  # a single file of this name
            fs.rm_file(where)
        parent = fs._parent(where)
        if (key := (str(fs.protocol), parent)) not in _tidied:
            _tidied.add(key)
            folders = [entry["name"] for entry in fs.ls(parent, detail=True) if entry["type"] == "directory"]
            for folder in folders[:_NEIGHBOURS]:
                folder = folder.rstrip("/")
                if folder != where and _looks_ours(fs, folder) and manifest_at(fs, folder) is None:
                    if _is_stale(fs, folder, now):
                        fs.rm(folder, recursive=True)


_tidied: set[tuple[str, str]] = set()


def put(fs: Any, path: str, content: bytes) -> None:
    """Write a remote file that appears whole or not at all."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if protocols & _STORES_WITH_ATOMIC_PUT:
        fs.pipe_file(path, content)
        return
    temporary = hidden_beside(path, "tmp")
    try:
        fs.pipe_file(temporary, content)
        fs.mv(temporary, path)
    except BaseException:
        with contextlib.suppress(Exception):
            fs.rm(temporary)
        raise


def manifest_at(fs: Any, where: str) -> bytes | None:
    """The manifest of the checkpoint folder at a remote path; None where there is none of ours."""
    try:
        raw: bytes = fs.cat_file(f"{where.rstrip('/')}/{MANIFEST}")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return raw if HEAD.match(raw) else None


def modified(fs: Any, path: str) -> int:
    """When a remote file was written: ns since 1970; 0 where the file system does not tell."""
    try:
        return int(fs.modified(path).timestamp() * 1e9)
    except NotImplementedError:
        return 0


def exists_remote(fs: Any, where: str) -> bool:
    """Whether something lies at a remote path; what a dead save has left there does not count."""
    fs.invalidate_cache()
    if not fs.exists(where):
        return False
    return not fs.isdir(where) or manifest_at(fs, where) is not None or not _looks_ours(fs, where)


def refuse_foreign_remote(fs: Any, where: str, url: str) -> None:
    """Make sure that no more than a checkpoint is lost when what lies at ``where`` is replaced or removed.

    Raises:
        CheckpointError: It is a folder with other things in it.
    """
    entries = _entries(fs, where)
    foreign = next((name for name, folder in entries if not (_OWN if folder else PART).fullmatch(name)), None)
    if foreign is not None:
        raise CheckpointError(
            f"{url!r} is a folder that holds {foreign!r}, which is no part of a checkpoint, so nothing in it was "
            "replaced or removed. Move that elsewhere, or choose another name."
        )
    if any(not folder for _, folder in entries) and manifest_at(fs, where) is None:
        raise CheckpointError(
            f"{url!r} is a folder that is no checkpoint, so nothing in it was replaced or removed. Remove it, or "
            "choose another name."
        )


def remove_remote(fs: Any, where: str, url: str) -> None:
    """Delete what lies at a remote path, a file or the folder of a checkpoint; from the first moment on it is gone.

    Raises:
        CheckpointError: It is a folder with more in it than a checkpoint.
        OSError: It cannot be done.
    """
    fs.invalidate_cache()
    where = where.rstrip("/")
    refuse_foreign_remote(fs, where, url)
    if manifest_at(fs, where) is not None:
        fs.rm_file(f"{where}/{MANIFEST}")
    if _has_keys(fs) and fs.isfile(where):
        fs.rm_file(where)
        fs.invalidate_cache()
    with contextlib.suppress(FileNotFoundError):
        if fs.exists(where):
            fs.rm(where, recursive=True)


def remove_folder_beside(fs: Any, where: str) -> None:
    """Remove the checkpoint folder that a single file of the same name replaced."""
    if _has_keys(fs) and manifest_at(fs, where) is not None:
        fs.rm_file(f"{where}/{MANIFEST}")
        for path in fs.find(f"{where}/"):
            fs.rm_file(path)


def _entries(fs: Any, where: str) -> list[tuple[str, bool]]:
    """Names of what lies in a remote folder, and whether each is a folder."""
    try:
        entries = fs.ls(where, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    inside = [entry for entry in entries if entry["name"].strip("/") != where.strip("/")]  # not the file `where`
    return [(_base(entry), entry["type"] == "directory") for entry in inside]


def _looks_ours(fs: Any, where: str) -> bool:
    """Whether a remote folder holds nothing but folders of saves, and these nothing but parts of checkpoints."""
    entries = _entries(fs, where)
    names = (str(path).rsplit("/", 1)[-1] for path in fs.find(where)) if entries else iter(())
    return all(folder and _OWN.fullmatch(name) for name, folder in entries) and all(map(PART.fullmatch, names))


def _is_stale(fs: Any, folder: str, now: int) -> bool:
    """Whether nothing was written to a remote folder for hours."""
    newest = max((modified(fs, path) for path in fs.find(folder)), default=0)
    return 0 < newest < now - _STALE_NS


def _has_keys(fs: Any) -> bool:
    """Whether the store has no folders, so that a file and files below it may have the same name."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return bool(protocols & (_STORES_WITH_ATOMIC_PUT - {"memory"}))


def _base(entry: Mapping[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
