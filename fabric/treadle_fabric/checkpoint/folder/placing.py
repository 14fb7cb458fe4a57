"""How a checkpoint folder takes its name: whole or not at all.

A folder is written under a hidden name and renamed. Where another checkpoint has the name already, the two change
places in one system call; a system that cannot do that moves the old one aside first, and the next process that looks
for a checkpoint moves the old one back if the new one never came.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import time
from typing import Final

from treadle_fabric.checkpoint.folder.layout import MANIFEST, PART, files_in, is_folder, is_sharded, refuse_foreign
from treadle_fabric.checkpoint.folder.manifest import sync_folder
from treadle_fabric.checkpoint.folder.names import hidden_beside, is_of_this_kernel

__all__ = [
    "bring_back",
    "copy_to_disk",
    "forget_asides",
    "link_folder",
    "lock_temporary",
    "make_temporary",
    "put_in_place",
    "remove_folder",
    "remove_stale",
]
_ASIDE: Final = re.compile(r"\.(.+)\.[0-9a-f]{32}\.old")
_TEMPORARY: Final = re.compile(r"\..+\.([0-9a-f]{32})\.tmp")
_STALE_S: Final = 6 * 3600.0
"""Long, because other machines do not see the lock on every file system."""
_STALE_HERE_S: Final = 60.0
"""Longer than it takes to lock what was made."""
_TAKEN: Final = (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR)


# --- taking a name ---


def make_temporary(path: str) -> str:
    """Make an empty folder beside ``path``, hidden, for what is to be put in its place."""
    parent = os.path.dirname(path)
    os.makedirs(parent, exist_ok=True)
    remove_stale(parent)
    temporary = hidden_beside(path, "tmp")
    os.mkdir(temporary)
    return temporary


def lock_temporary(path: str) -> int | None:
    """Mark a temporary folder or file as one that is being written, for as long as this process lives.

    Returns:
        A file descriptor, to be closed at the end; None where the system has no such locks.
    """
    descriptor = None
    try:
        import fcntl  # not on Windows

        descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)  # NFS locks what it may write
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def remove_stale(parent: str) -> None:
    """Remove what killed processes left half written: temporary folders and files on which no process holds a lock."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(parent)):
            if (match := _TEMPORARY.fullmatch(entry.name)) is None:
                continue
            inside = [each.path for each in os.scandir(entry.path)] if entry.is_dir() else []
            changed = max(os.stat(each).st_mtime for each in (entry.path, *inside))
            if time.time() - changed < (_STALE_HERE_S if is_of_this_kernel(match[1]) else _STALE_S):
                continue
            descriptor = lock_temporary(entry.path)
            if descriptor is not None:
                _delete(entry.path)
                os.close(descriptor)


def put_in_place(fresh: str, at: str) -> None:
    """Rename the file or folder ``fresh`` to ``at``; a file or a checkpoint folder of that name is replaced.

    At whatever moment the process is killed, ``at`` is the old one or the new one, or :func:`bring_back` restores the
    old one; a reader never finds a mixture.

    Raises:
        CheckpointError: ``at`` is a folder with more in it than a checkpoint, and stays as it is.
        OSError: The rename failed. ``at`` is what it was.
    """
    for attempt in range(5):
        refuse_foreign(at)
        try:
            if os.path.lexists(at) and (is_folder(at) or is_folder(fresh)):  # else one rename does it
                if not _exchange(fresh, at):
                    _move_aside(fresh, at)
            else:
                os.replace(fresh, at)
            break
        except OSError as e:  # the bring_back of another process came between
            if e.errno not in _TAKEN or attempt == 4:
                raise
    sync_folder(os.path.dirname(at))
    if os.path.lexists(fresh):  # the old one
        _delete(fresh)
    forget_asides(at)


def _exchange(a: str, b: str) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2  # Linux; a file system may lack it (NFS does)
    except (OSError, TypeError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(swap(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


def _move_aside(fresh: str, at: str) -> None:
    home = hidden_beside(at, "old")
    aside = os.path.join(home, os.path.basename(at))  # under its own name, which may be too long to add anything to
    os.mkdir(home)
    try:
        os.rename(at, aside)
        os.rename(fresh, at)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rename(aside, at)
        with contextlib.suppress(OSError):
            os.rmdir(home)
        raise


def bring_back(parent: str | os.PathLike[str]) -> None:
    """Give checkpoints in ``parent`` their names again, if a process was killed while it replaced them."""
    for name, aside in _asides(os.fspath(parent)):
        if not os.path.lexists(os.path.join(parent, name)):
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(aside, os.path.join(parent, name))
                _remove_home(aside)


def remove_folder(path: str) -> None:
    """Delete the folder of a checkpoint; from the first moment on nothing lies at ``path``, rather than a part of it.

    Raises:
        CheckpointError: It holds more than a checkpoint, or is none. Nothing was deleted.
        OSError: It cannot be done.
    """
    refuse_foreign(path)
    aside = hidden_beside(os.path.abspath(path), "tmp")
    forget_asides(path)
    os.rename(path, aside)
    try:
        shutil.rmtree(aside)
    except FileNotFoundError:  # another process found it stale, and removes it, too
        shutil.rmtree(aside, ignore_errors=True)


def forget_asides(path: str) -> None:
    """Remove what a killed process had moved aside for ``path``, so that :func:`bring_back` never restores it."""
    parent, name = os.path.split(os.path.abspath(path))
    for known, aside in _asides(parent):
        if known == name:
            _delete(aside)
            _remove_home(aside)


def _asides(parent: str) -> list[tuple[str, str]]:
    """The names of what was moved aside in a folder, and the paths where it lies."""
    found: list[tuple[str, str]] = []
    with contextlib.suppress(OSError):
        for entry in os.listdir(parent):
            if (match := _ASIDE.fullmatch(entry)) is None:
                continue
            path = os.path.join(parent, entry)
            if is_folder(path) and not is_sharded(path):  # the home of what was moved
                found += [(name, os.path.join(path, name)) for name in os.listdir(path)]
            else:  # as it was moved by releases before
                found.append((match[1], path))
    return found


def _remove_home(aside: str) -> None:
    """Remove the folder in which something lay that was moved aside."""
    home = os.path.dirname(aside)
    if _ASIDE.fullmatch(os.path.basename(home)):
        with contextlib.suppress(OSError):
            os.rmdir(home)


def _delete(path: str) -> None:
    if is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.remove(path)


def copy_to_disk(source: str, target: str) -> None:
    """Copy a file; it is on the disk when this returns, so that the source may go."""
    with open(source, "rb") as whence, open(target, "xb") as to:
        shutil.copyfileobj(whence, to, 4 * 1024 * 1024)
        to.flush()
        os.fsync(to.fileno())


def link_folder(target: str, link: str, *, or_copy: bool = False) -> None:
    """Make ``link`` a second checkpoint folder whose files are hard links to the files of ``target``.

    It takes no room, and stays when ``target`` is removed.

    Args:
        target: The checkpoint folder.
        link: The path of the other one.
        or_copy: Copy the files where the file system has no hard links. Default: False.

    Raises:
        CheckpointError: ``link`` is a folder with more in it than a checkpoint, and stays as it is.
        OSError: The file system has no hard links. ``link`` is what it was.
    """
    fresh = make_temporary(os.path.abspath(link))
    lock = lock_temporary(fresh)
    try:
        names = sorted(filter(PART.fullmatch, files_in(target)), key=lambda name: name == MANIFEST)
        for name in names:
            ours, theirs = os.path.join(target, name), os.path.join(fresh, name)
            os.makedirs(os.path.dirname(theirs), exist_ok=True)
            try:
                os.link(ours, theirs)
            except OSError:
                if not or_copy:
                    raise
                copy_to_disk(ours, theirs)
        sync_folder(fresh)
        put_in_place(fresh, os.path.abspath(link))
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)
