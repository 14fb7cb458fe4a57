"""The newest checkpoint that is good."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from treadle_fabric.checkpoint.folder.layout import has_manifest, is_sharded, representative
from treadle_fabric.checkpoint.folder.placing import bring_back
from treadle_fabric.checkpoint.torch_file import TorchCheckpointIO
from treadle_fabric.errors import CheckpointError
from treadle_fabric.rank_zero import rank_zero_warn
from treadle_fabric.types import PathLike

__all__ = ["checkpoints_in", "newest_good", "read_outline"]

EXTENSION = ".ckpt"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.(tmp|old)")


def newest_good(
    folders: PathLike | Iterable[PathLike], *, recursive: bool = True, holds: Collection[str] = ()
) -> Path | None:
    """The newest checkpoint that is whole; one that is not is named in a warning, and the one before it is tried.

    Args:
        folders: Local folders, one or several; those that are not there count as empty.
        recursive: Look into their subfolders too.
        holds: Keys that the checkpoint must have; one without them is passed over.

    Returns:
        The path of a ``.ckpt`` file, or of the folder of a sharded checkpoint; None where there is no good one. Of
        those written at the same time it is the one with the greatest ``global_step``.
    """
    best: tuple[int, Path] | None = None
    time = 0
    for path, written in checkpoints_in(folders, recursive=recursive):
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


def checkpoints_in(folders: PathLike | Iterable[PathLike], *, recursive: bool = True) -> list[tuple[Path, int]]:
    """The checkpoints in local folders and the times of their last change in ns since 1970, the newest first.

    They are the ``.ckpt`` files, and the folders that are sharded checkpoints. One that has several names, links
    included, is listed once.
    """
    given = [folders] if isinstance(folders, str | os.PathLike) else folders
    found: dict[tuple[int, int], tuple[int, str]] = {}
    for folder in given:
        for path in _files(os.path.abspath(os.fspath(folder)), recursive):
            try:
                status = os.stat(representative(path))
            except OSError:  # gone meanwhile, or a link to nothing
                continue
            key, entry = (status.st_dev, status.st_ino), (status.st_mtime_ns, path)
            if key not in found or (os.path.islink(found[key][1]), path) > (os.path.islink(path), found[key][1]):
                found[key] = entry
    return [(Path(path), time) for time, path in sorted(found.values(), reverse=True)]


def _files(folder: str, recursive: bool) -> Iterator[str]:
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
            elif name.endswith(EXTENSION):
                yield path
        if not recursive:
            folders.clear()


def read_outline(path: PathLike) -> dict[str, Any]:
    """Read a checkpoint with every byte of it checked, but its tensors on the meta device.

    Raises:
        CheckpointError: It is not whole, no checkpoint, or nothing that loads without running code of its own.
    """
    found: Any = TorchCheckpointIO().load_checkpoint(path, map_location="meta")
    if not isinstance(found, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(found).__name__}, and a checkpoint is a dict.")
    return found
