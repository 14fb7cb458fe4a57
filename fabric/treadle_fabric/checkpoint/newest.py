"""The checkpoints in a folder: which there are, when they were written, and the newest that is good."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final

from treadle_fabric.checkpoint.folder.layout import MANIFEST, has_manifest, is_sharded, representative
from treadle_fabric.checkpoint.folder.placing import bring_back
from treadle_fabric.checkpoint.folder.remote import manifest_at, modified
from treadle_fabric.checkpoint.reading import read_outline
from treadle_fabric.checkpoint.torch_file import file_system
from treadle_fabric.errors import CheckpointError
from treadle_fabric.rank_zero import rank_zero_warn
from treadle_fabric.types import PathLike

__all__ = ["checkpoints_in", "names_of", "newest_good", "remote_checkpoints_in", "written_at"]

EXTENSION: Final = ".ckpt"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.(tmp|old)")


def newest_good(
    folders: PathLike | Iterable[PathLike],
    *,
    recursive: bool = True,
    holds: Collection[str] = (),
    endings: Collection[str] = (EXTENSION,),
) -> Path | None:
    """Find the newest checkpoint that is whole. A damaged one is named in a warning, and the one before it is tried.

    Args:
        folders: One local folder or several; a folder that does not exist counts as empty.
        recursive: Look into their subfolders too.
        holds: Keys that the checkpoint must have; a checkpoint that lacks one of them is passed over.
        endings: How the names of files end that are checkpoints.

    Returns:
        The path of a file, or of the folder of a sharded checkpoint; None if no checkpoint is good. Of
        several that were written at the same time, the one with the greatest ``global_step``.
    """
    best: tuple[int, Path] | None = None
    time = 0
    for path, written in checkpoints_in(folders, recursive=recursive, endings=endings):
        if best is not None and written != time:
            break
        try:
            outline = read_outline(path)
        except CheckpointError as e:
            rank_zero_warn(f"{e} The newest good checkpoint before it is used.")
            continue
        if not all(key in outline for key in holds):
            continue
        step = outline.get("global_step")
        step, time = step if isinstance(step, int) else 0, written
        if best is None or step > best[0]:
            best = step, path
    return best[1] if best is not None else None


def checkpoints_in(
    folders: PathLike | Iterable[PathLike],
    *,
    recursive: bool = True,
    names: Iterable[str] = ("*",),
    endings: Collection[str] = (EXTENSION,),
) -> list[tuple[Path, int]]:
    """List the checkpoints in local folders, the newest first.

    They are the files whose names have one of ``endings``, and the folders that are sharded checkpoints. A checkpoint
    that a killed process had moved aside, to replace it, gets its name again.

    Args:
        folders: One local folder or several; a folder that does not exist counts as empty.
        recursive: Look into their subfolders too.
        names: Patterns such as ``"*last*.ckpt"``; a checkpoint has to have a name that one of them matches.
        endings: How the names of files end that are checkpoints.

    Returns:
        Paths, and the times of the last change in ns since 1970. Of several names of one checkpoint, links included,
        there is one.
    """
    given = [folders] if isinstance(folders, str | os.PathLike) else folders
    found: dict[tuple[int, int], tuple[int, str]] = {}
    for folder in given:
        for path in _files(os.path.abspath(os.path.expanduser(folder)), recursive, tuple(endings)):
            if not any(fnmatch.fnmatchcase(os.path.basename(path), name) for name in names):
                continue
            try:
                status = os.stat(representative(path))
            except OSError:  # gone meanwhile, or a link to nothing
                continue
            key, entry = (status.st_dev, status.st_ino), (status.st_mtime_ns, path)
            if key not in found or (os.path.islink(found[key][1]), path) > (os.path.islink(path), found[key][1]):
                found[key] = entry
    return [(Path(path), time) for time, path in sorted(found.values(), reverse=True)]


def remote_checkpoints_in(
    folder: str, *, recursive: bool = True, names: Iterable[str] = ("*",), endings: Collection[str] = (EXTENSION,)
) -> list[tuple[str, int]]:
    """List the checkpoints in a remote folder, the newest first: files, and folders that are checkpoints.

    Args:
        folder: An fsspec URL; a folder that does not exist counts as empty.
        recursive: Look into its subfolders too.
        names: Patterns; a checkpoint has to have a name that one of them matches.
        endings: How the names of files end that are checkpoints.

    Returns:
        URLs that begin with ``folder``, and the times of the last change in ns since 1970.
    """
    fs, where = file_system(folder)
    if fs is None:  # file:// is no other place than the local disk
        here = checkpoints_in(where, recursive=recursive, names=names, endings=endings)
        return [(str(path), time) for path, time in here]
    fs.invalidate_cache()  # another machine may have written since
    try:
        files = [str(path) for path in fs.find(where, maxdepth=None if recursive else 2)]
    except FileNotFoundError:
        return []
    top = where.rstrip("/")
    found = []
    for path in files:
        parent, _, name = path.rpartition("/")
        inner = parent.removeprefix(top)
        is_file = name.endswith(tuple(endings)) and (recursive or not inner)
        at = parent if name == MANIFEST else path if is_file else None
        if at is None or not any(fnmatch.fnmatchcase(at.rpartition("/")[2], pattern) for pattern in names):
            continue
        if name != MANIFEST or manifest_at(fs, parent) is not None:
            found.append((modified(fs, path), f"{folder.rstrip('/')}/{at.removeprefix(top).lstrip('/')}".rstrip("/")))
    return [(url, time) for time, url in sorted(found, reverse=True)]


def written_at(path: PathLike) -> int:
    """When the checkpoint at a local path, a file or a folder, or at a URL was written: ns since 1970."""
    fs, where = file_system(path)
    if fs is None:
        return os.stat(representative(where)).st_mtime_ns
    return modified(fs, where if manifest_at(fs, where) is None else f"{where.rstrip('/')}/{MANIFEST}")


def names_of(path: Path) -> list[Path]:
    """All names that a checkpoint has in its folder, links first: removed in this order, no dead link is left."""
    at = Path(representative(path))
    same = [p for p in path.parent.iterdir() if p.exists() and Path(representative(p)).samefile(at)]
    same = [p for p in same if p.suffix == path.suffix and not p.name.startswith(".")]
    return sorted(same, key=lambda p: not p.is_symlink())


def _files(folder: str, recursive: bool, endings: tuple[str, ...]) -> Iterator[str]:
    if has_manifest(folder):  # what was given may be a folder of checkpoints with a `meta.pt` beside them
        yield folder
        return
    for parent, folders, _ in os.walk(folder):
        bring_back(parent)
        try:
            entries = sorted(os.listdir(parent))
        except OSError:  # gone meanwhile
            continue
        for name in entries:
            path = os.path.join(parent, name)
            if name.startswith("."):  # what is being written, or was when its process was killed
                if name in folders and _TEMPORARY.fullmatch(name):
                    folders.remove(name)
            elif os.path.isdir(path):
                if is_sharded(path):
                    yield path
                    if name in folders:
                        folders.remove(name)
            elif name.endswith(endings):
                yield path
        if not recursive:
            folders.clear()
