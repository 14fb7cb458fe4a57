"""Which files a checkpoint folder has, and how to tell it from a user's own folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from treadle_fabric.errors import CheckpointError

__all__ = [
    "ENGINE_TAG",
    "INDEX",
    "LATEST",
    "MANIFEST",
    "PLAIN",
    "files_in",
    "has_manifest",
    "identity",
    "identity_of",
    "is_sharded",
    "rank_file",
    "refuse_foreign",
    "representative",
    "size_of",
    "unmixed",
]

T = TypeVar("T")
MANIFEST: Final = "manifest.json"
PLAIN: Final = "meta.pt"
"""The file of everything but the large tensors."""
INDEX: Final = ".metadata"
"""The index that torch.distributed.checkpoint would read. It is a pickle, and is never read here."""
LATEST: Final = "latest"
"""The file in which DeepSpeed keeps the name of the newest part of a folder."""
ENGINE_TAG: Final = "checkpoint"
"""The name of the one part that a folder of ours has, where DeepSpeed writes into it: a folder of DeepSpeed's files."""
PART: Final = re.compile(
    r"manifest\.json|meta\.pt|\.metadata|__\d+_\d+\.distcp|rank_\d+\.pt"
    rf"|{LATEST}|{ENGINE_TAG}/[a-z0-9_]{{0,80}}_states\.pt"
)
_READS: Final = 5
HEAD: Final = re.compile(rb'\{"crc32": "([0-9a-f]{8})",\n')


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether a local path is a folder that is, or was, one checkpoint; parts of it may be missing."""
    if has_manifest(path):
        return True
    try:
        marked = any(os.path.isfile(os.path.join(path, name)) for name in (PLAIN, INDEX))
        return marked and _foreign_in(path) is None  # a user's own folder may have files of such names
    except OSError:  # gone meanwhile, or not to be listed
        return False


def rank_file(rank: int) -> str:
    """The file of what a rank has of its own."""
    return f"rank_{rank}.pt"


def has_manifest(path: str | os.PathLike[str]) -> bool:
    """Whether a local path is a folder with a manifest of ours, be it damaged."""
    try:
        with open(os.path.join(path, MANIFEST), "rb") as file:  # many a folder has a file of that name
            return HEAD.match(file.read(32)) is not None
    except OSError:
        return False


def refuse_foreign(path: str) -> None:
    """Make sure that no more than a checkpoint is lost when what lies at ``path`` is replaced or removed.

    Raises:
        CheckpointError: It is a folder that is no checkpoint, or that holds other things, too.
    """
    if not is_folder(path):
        return
    try:
        foreign = _foreign_in(path)
        empty = foreign is None and not os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):  # gone meanwhile
        return
    if foreign is not None:
        raise CheckpointError(
            f"{path!r} is a folder that holds {foreign!r}, which is no part of a checkpoint, so nothing in it was "
            "replaced or removed. Move that elsewhere, or choose another name."
        )
    if not empty and not is_sharded(path):
        raise CheckpointError(
            f"{path!r} is a folder that is no checkpoint, so nothing in it was replaced or removed. Remove it, or "
            "choose another name."
        )


def _foreign_in(path: str | os.PathLike[str]) -> str | None:
    """The name of something in a folder that is no part of a checkpoint; None if there is no such thing."""
    return next((name for name in files_in(path, folders=True) if not PART.fullmatch(name)), None)


def files_in(path: str | os.PathLike[str], *, folders: bool = False) -> Iterator[str]:
    """The names of the files in a folder, and in the one folder in it that is part of a checkpoint.

    Args:
        path: The folder.
        folders: Give the names of all other folders, too, with a slash at the end, which no name of a file has.
    """
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                yield entry.name
            elif entry.name == ENGINE_TAG:
                with os.scandir(entry.path) as inner:
                    for each in inner:
                        if not each.is_dir(follow_symlinks=False):
                            yield f"{ENGINE_TAG}/{each.name}"
                        elif folders:
                            yield f"{ENGINE_TAG}/{each.name}/"
            elif folders:
                yield f"{entry.name}/"


def representative(path: str | os.PathLike[str]) -> str:
    """The file that has the identity and the time of the checkpoint at ``path``: the file itself, or the manifest."""
    manifest = os.path.join(path, MANIFEST)
    return manifest if os.path.isfile(manifest) else os.fspath(path)


def unmixed(now: Callable[[], tuple[int, ...] | None], name: str, read: Callable[[], T]) -> T:
    """Read a folder with ``read``, so that all that is read is of one checkpoint.

    If another checkpoint takes the name meanwhile, what was read, or found to be damaged, may be a mixture of both; so
    it is read again.

    Args:
        now: Tells which checkpoint has the name at the moment.
        name: What the user calls it.
        read: Reads all of it.

    Raises:
        CheckpointError: What ``read`` raised, or other checkpoints took the name again and again.
    """
    for _ in range(_READS):
        before = now()
        try:
            found = read()
        except CheckpointError:
            if now() == before:
                raise
        else:
            if now() == before:
                return found
    raise CheckpointError(
        f"{name!r} could not be read: another checkpoint took its place {_READS} times meanwhile. Load it when nobody "
        "saves to it, or another one."
    )


def identity(path: str) -> tuple[int, ...] | None:
    """Which checkpoint has this name; another name for the same checkpoint gives the same. None: there is none."""
    try:
        status = os.stat(representative(path))
    except OSError:
        return None
    return identity_of(status)


def identity_of(status: os.stat_result) -> tuple[int, ...]:
    """The same of a file that is open, from what ``os.fstat`` gave."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def size_of(path: str | os.PathLike[str]) -> int:
    """Bytes of a checkpoint, be it a file or a folder."""
    if not os.path.isdir(path):
        return os.stat(path).st_size
    return sum(os.stat(os.path.join(path, name)).st_size for name in files_in(path))


def is_folder(path: str) -> bool:
    """Whether a folder lies at ``path``, and not a link to one."""
    return os.path.isdir(path) and not os.path.islink(path)
