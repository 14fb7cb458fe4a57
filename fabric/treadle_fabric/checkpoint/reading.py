"""Read or remove what lies at a path, be it a file or a folder."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from treadle_fabric.checkpoint.folder.layout import LATEST, has_manifest, identity, identity_of
from treadle_fabric.checkpoint.folder.manifest import read_manifest, verify
from treadle_fabric.checkpoint.folder.placing import bring_back, forget_asides, remove_folder
from treadle_fabric.checkpoint.folder.remote import exists_remote, manifest_at, remove_remote
from treadle_fabric.checkpoint.folder.source import FolderSource, LocalSource, RemoteSource
from treadle_fabric.checkpoint.host.checked import trusting
from treadle_fabric.checkpoint.per_rank import parts_on_demand
from treadle_fabric.checkpoint.stored.folder import files_at_once, load_folder
from treadle_fabric.checkpoint.torch_file import file_system, load_file, reason_of
from treadle_fabric.errors import CheckpointError
from treadle_fabric.types import PathLike

__all__ = [
    "check_share",
    "folder_at",
    "lies_at",
    "load_any",
    "read_folder",
    "read_outline",
    "read_quickly",
    "remove_any",
]


def load_any(path: PathLike, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a file or a folder; see :meth:`TorchCheckpointIO.load_checkpoint`."""
    source = folder_at(path)
    if source is None:
        return load_file(path, map_location, weights_only)
    try:
        return read_folder(source, map_location, weights_only)
    except CheckpointError:
        if folder_at(path) is not None:
            raise
        return load_file(path, map_location, weights_only)  # a file took its place


def read_folder(
    source: FolderSource, map_location: Any | None = None, weights_only: bool | None = None, *, packed: bool = False
) -> dict[str, Any]:
    """Read a folder of ours, or one that DeepSpeed wrote by itself; arguments as those of :func:`load_folder`."""
    if _is_foreign(source):
        from treadle_fabric.checkpoint.zero.foreign import load_deepspeed_folder  # few folders are of that kind

        return load_deepspeed_folder(source.path_of(LATEST)[: -len(LATEST) - 1], map_location)
    return load_folder(source, map_location, weights_only, packed=packed)


def _is_foreign(source: FolderSource) -> bool:
    """Whether this is a folder that DeepSpeed wrote, and we did not."""
    if not isinstance(source, LocalSource) or has_manifest(source.path):
        return False
    return os.path.isfile(os.path.join(source.path, LATEST))


def folder_at(path: PathLike) -> FolderSource | None:
    """The checkpoint folder at a local path or a URL; None: it is a file, or nothing."""
    fs, where = file_system(path)
    if fs is not None:
        return RemoteSource(fs, where, str(path)) if manifest_at(fs, where) is not None else None
    if not os.path.lexists(where):
        bring_back(os.path.dirname(os.path.abspath(where)))
    return LocalSource(where, str(path)) if os.path.isdir(where) else None


def check_share(path: PathLike, share: int, shares: int) -> tuple[int, ...] | None:
    """Check every byte of some of the files of a checkpoint folder, for processes that share the check out.

    Args:
        path: A local path or a URL.
        share: Which of the shares is checked here, from 0.
        shares: The number of shares. The large files are shared out evenly.

    Returns:
        What ``trusting`` takes once all shares are checked. None: this is no folder of ours, or it changed meanwhile.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    try:
        source = folder_at(path)
    except (OSError, ValueError, ImportError):  # of another CheckpointIO, which has paths of its own
        return None
    if source is None or (isinstance(source, LocalSource) and not has_manifest(source.path)):
        return None
    before = source.identity()
    try:
        manifest = read_manifest(source)
        files = sorted(files_at_once(manifest), key=lambda name: -manifest["files"][name]["size"])
        verify(source, manifest, files[share::shares])
    except CheckpointError:
        if source.identity() == before:
            raise
        return None
    return before if source.identity() == before else None


def lies_at(path: PathLike) -> bool:
    """Whether anything lies at a local path or a URL; a dangling link does, and what a dead save left at a URL not."""
    fs, where = file_system(path)
    return os.path.lexists(where) if fs is None else exists_remote(fs, where)


def remove_any(path: PathLike) -> None:
    """Delete a file, or the folder of a checkpoint; see :meth:`TorchCheckpointIO.remove_checkpoint`."""
    fs, where = file_system(path)
    try:
        if fs is not None:
            remove_remote(fs, where, str(path))
        elif os.path.isdir(where) and not os.path.islink(where):
            remove_folder(where)
        else:
            forget_asides(where)
            with contextlib.suppress(FileNotFoundError):
                os.remove(where)
    except OSError as e:
        raise CheckpointError(f"The checkpoint {str(path)!r} could not be removed: {reason_of(e)}.") from e


def read_outline(path: PathLike) -> dict[str, Any]:
    """Read a checkpoint with every byte of it checked, but its tensors on the meta device.

    Raises:
        CheckpointError: It is not whole, no checkpoint, or nothing that loads without running code of its own.
    """
    found: Any = load_any(path, map_location="meta")
    if not isinstance(found, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(found).__name__}, and a checkpoint is a dict.")
    return found


def read_quickly(path: PathLike) -> dict[str, Any]:
    """Read a checkpoint for a look at its plain values: tensors are on the meta device, and nothing is checked.

    Of a local file or folder only the plain values are read; a remote file is fetched whole.

    Returns:
        The content; nothing where there is no checkpoint that can be read so. Whoever loads it learns why not.
    """
    fs, where = file_system(path)
    try:
        known = None
        if fs is None:
            known = identity(where) if os.path.isdir(where) else identity_of(os.stat(where))
        with parts_on_demand(), trusting([known] if known else []):
            found: Any = load_any(path, map_location="meta")
    except (OSError, CheckpointError):
        return {}
    return found if isinstance(found, dict) else {}
