"""One checkpoint, one file: a ``torch.save`` archive that appears under its name whole or not at all.

A save goes to a temporary file in the same folder, is flushed to the disk, and is then renamed. If a full disk, a
signal or a lost machine ends the save early, an earlier checkpoint of that name is left as it was.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import mmap
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import torch

from treadle_fabric.checkpoint.archive import (
    check_archive,
    forbidden_globals,
    numpy_allowed,
    state_path_of,
    weights_only_reason,
)
from treadle_fabric.checkpoint.folder.layout import identity_of, is_sharded, refuse_foreign
from treadle_fabric.checkpoint.folder.names import check_name, hidden_beside
from treadle_fabric.checkpoint.folder.placing import lock_temporary, put_in_place, remove_stale
from treadle_fabric.checkpoint.folder.remote import put, refuse_foreign_remote, remove_folder_beside
from treadle_fabric.checkpoint.host.checked import is_checked, set_checked
from treadle_fabric.checkpoint.host.mapping import active_maps, mappable
from treadle_fabric.checkpoint.seal import seal
from treadle_fabric.checkpoint.values.moved import PICKLE
from treadle_fabric.checks import require_package
from treadle_fabric.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointUnsafeError,
    MisconfigurationException,
)
from treadle_fabric.types import PathLike

__all__ = [
    "file_system",
    "get_filesystem",
    "is_folder",
    "is_local",
    "is_object_store",
    "load_file",
    "load_plain",
    "neighbours",
    "reason_of",
    "save_file",
    "why_not_written",
]

_REMEDIES = {
    errno.ENOSPC: "Free some space, or save elsewhere.",
    errno.EDQUOT: "Raise the disk quota, or save elsewhere.",
    errno.EFBIG: "Raise the file size limit (`ulimit -f`), or save elsewhere.",
    errno.EROFS: "Save to a file system that is writable.",
    errno.EACCES: "Change the permissions, or save elsewhere.",
    errno.EPERM: "Change the permissions, or save elsewhere.",
    errno.ENOENT: "Keep the folder in place while the run saves to it.",
    errno.EEXIST: "A part of the path is a file: choose a path whose parents are folders.",
    errno.ENOTDIR: "A part of the path is a file: choose a path whose parents are folders.",
    errno.ENAMETOOLONG: "Shorten the name: it may take 255 bytes, and in UTF-8 a letter outside ASCII takes 2 to 4.",
    errno.EISDIR: "A folder of that name is in the way: remove it, or choose another name.",
}


def file_system(path: PathLike, storage_options: Any | None = None) -> tuple[Any | None, str]:
    """The fsspec file system (None: the local disk) and the path in it; "~" is the user's home."""
    text = os.fspath(path)
    if "://" in text:
        import fsspec  # heavy, and only for such paths
        from fsspec.implementations.local import LocalFileSystem

        _require_client(text)
        fs, where = fsspec.url_to_fs(text, **(storage_options or {}))
        if not isinstance(fs, LocalFileSystem):
            return fs, where
        text = where
    if storage_options:
        raise MisconfigurationException(
            f"storage_options={storage_options!r} are for remote paths (protocol://...), and {text!r} is local. "
            "Leave them out."
        )
    return None, os.path.expanduser(text)


def get_filesystem(path: PathLike, **kwargs: Any) -> Any:
    """The fsspec file system of a local path or a URL; ``kwargs`` are the options of its constructor."""
    import fsspec  # heavy

    _require_client(os.fspath(path))
    return fsspec.url_to_fs(os.fspath(path), **kwargs)[0]


def _require_client(path: str) -> None:
    if path.startswith(("s3://", "s3a://")):
        require_package("s3fs", f"The path {path!r}", "s3")


# --- saving ---


def save_file(checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
    """Write a checkpoint to one file; see :meth:`TorchCheckpointIO.save_checkpoint`."""
    fs, where = file_system(path, storage_options)
    try:
        if fs is None:
            _save_local(checkpoint, where)
        else:
            _save_remote(checkpoint, fs, where)
    except Exception as e:
        raise CheckpointError(f"The checkpoint {str(path)!r} was not written: {why_not_written(e, checkpoint)}") from e


def _save_local(checkpoint: dict[str, Any], path: str) -> None:
    if os.path.isdir(path) and not is_sharded(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    path = os.path.abspath(path)
    check_name(path)
    refuse_foreign(path)
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = hidden_beside(path, "tmp")
    lock: int | None = None
    try:
        lock = _write(checkpoint, folder, temporary)
        put_in_place(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _write(checkpoint: dict[str, Any], folder: str, name: str) -> int | None:
    """Write a file that has no name, if the system can do that, until it is complete and on the disk.

    A process that is killed while it writes then leaves nothing behind. Elsewhere (NFS, for example) the next save
    removes what it left.

    Returns:
        What locks the file until it is closed, if the file had a name while it was written.
    """
    nameless = None
    with contextlib.suppress(OSError, AttributeError):  # another system, or a file system without the feature
        nameless = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    if nameless is not None:
        with open(nameless, "w+b") as file:
            _dump(checkpoint, file)
            with contextlib.suppress(OSError):  # no /proc, say: the named way below works there
                # src_dir_fd is only there to make Python follow the link
                os.link(f"/proc/self/fd/{nameless}", name, src_dir_fd=nameless)
                return None
    remove_stale(folder)
    with open(name, "x+b") as file:
        lock = lock_temporary(name)
        try:
            _dump(checkpoint, file)
        except BaseException:
            if lock is not None:
                os.close(lock)
            raise
    return lock


def _dump(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    torch.save(checkpoint, file)
    seal(file)
    file.flush()
    os.fsync(file.fileno())


def _save_remote(checkpoint: dict[str, Any], fs: Any, path: str) -> None:
    # Serialized before the upload begins: closing a remote file after an error would publish the half of it
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    seal(buffer)
    fs.makedirs(fs._parent(path), exist_ok=True)
    refuse_foreign_remote(fs, path, path)
    put(fs, path, buffer.getvalue())
    remove_folder_beside(fs, path)


def why_not_written(error: BaseException, checkpoint: Any) -> str:
    """What went wrong in a save, and the remedy, in sentences."""
    if isinstance(error, CheckpointError):
        return str(error)
    kept = "An earlier one of that name is untouched."
    cause = _first_os_error(error)
    if cause is not None:
        return f"{reason_of(cause)}. {kept} {_REMEDIES.get(cause.errno or 0, 'Save elsewhere.')}"
    if isinstance(error, pickle.PicklingError | AttributeError | TypeError):
        where = state_path_of(checkpoint)
        return f"{where} cannot be pickled ({error}). Save its state_dict() or plain values, or leave it out."
    return f"{reason_of(error)}. {kept}"


def _first_os_error(error: BaseException) -> OSError | None:
    """The OSError behind an error: torch reports a failed write as an internal check that did not hold."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def reason_of(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} [{errno.errorcode.get(error.errno or 0, error.errno)}]"
    return f"{type(error).__name__}: {error}".strip().rstrip(":. ")


# --- loading ---


def load_file(path: PathLike, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a checkpoint that is one file; see :meth:`TorchCheckpointIO.load_checkpoint`."""
    fs, where = file_system(path)
    target: Any = "cpu" if map_location is None else map_location
    safe = weights_only is None or bool(weights_only)
    maps = active_maps()
    with _opened(fs, where, path) as file:
        found = identity_of(os.fstat(file.fileno())) if fs is None else None
        is_zip, stored = check_archive(file, str(path), every_byte=not is_checked(found))
        set_checked(found)
        mapped = stored and fs is None and (maps is not None or _leaves_the_host(target)) and mappable(file)
        try:
            if not mapped:
                return _load(file, target, safe)
            return _load_mapped(file, where, target if maps is None else maps.placing(target), safe)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as e:
            raise _load_error(e, file, path, is_zip, safe) from e


@contextlib.contextmanager
def _opened(fs: Any | None, where: str, path: PathLike) -> Iterator[IO[bytes]]:
    """The file, open and seekable."""
    try:
        file = open(where, "rb") if fs is None else io.BytesIO(fs.cat_file(where))  # noqa: SIM115 closed below
    except FileNotFoundError as e:
        raise CheckpointNotFoundError(f"There is no checkpoint at {str(path)!r}. {neighbours(fs, where)}") from e
    except OSError as e:
        raise CheckpointError(f"The checkpoint {str(path)!r} cannot be opened: {reason_of(e)}.") from e
    with file:
        try:
            yield file
        except OSError as e:
            raise CheckpointError(f"The checkpoint {str(path)!r} could not be read: {reason_of(e)}.") from e


def _leaves_the_host(target: Any) -> bool:
    """Whether every tensor is copied away from the file, so that it can be mapped and needs no :class:`FileMaps`."""
    return isinstance(target, str | torch.device) and not str(target).startswith("cpu")


def neighbours(fs: Any | None, where: str) -> str:
    """What lies where the missing file was looked for."""
    if fs is not None:
        return "Check the path."
    folder = os.path.dirname(where) or os.curdir
    try:
        names = sorted(n for n in os.listdir(folder) if not n.startswith("."))
    except OSError:
        return f"The folder {folder!r} is not there either: check the path."
    if not names:
        return f"The folder {folder!r} is empty: check the path."
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"In its folder there is: {shown}."


def _load(file: IO[bytes], target: Any, safe: bool) -> dict[str, Any]:
    file.seek(0)
    how = {"map_location": target, "weights_only": safe, "pickle_module": None if safe else PICKLE}
    with numpy_allowed():
        state: dict[str, Any] = torch.load(file, mmap=False, **how)
    return state


def _load_mapped(file: IO[bytes], where: str, target: Any, safe: bool) -> dict[str, Any]:
    opened = f"/proc/self/fd/{file.fileno()}"  # another file may have taken the name since this one was checked
    source = opened if os.path.exists(opened) else where
    options = torch.serialization.get_default_mmap_options()
    private: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if options not in (None, mmap.MAP_PRIVATE):  # what is written to a tensor would be written to the file
        private = torch.serialization.set_default_mmap_options(mmap.MAP_PRIVATE)
    how = {"map_location": target, "weights_only": safe, "pickle_module": None if safe else PICKLE}
    with private, numpy_allowed():
        state: dict[str, Any] = torch.load(source, mmap=True, **how)
    return state


def _load_error(error: Exception, file: IO[bytes], path: PathLike, is_zip: bool, safe: bool) -> CheckpointError:
    if safe and isinstance(error, pickle.UnpicklingError):
        names = forbidden_globals(file, is_zip, error)
        if names:
            listed, last = ", ".join(names), names[-1].rpartition(".")[2]
            return CheckpointUnsafeError(
                f"{str(path)!r} was not loaded: it holds {listed}, and only tensors and plain containers are loaded "
                "without being asked, because anything else can run code. If you trust its author, either allow "
                f"those by name with `torch.serialization.add_safe_globals([{last}])`, or pass `weights_only=False`, "
                "or have `treadle checkpoint convert` make a file of it that always loads."
            )
        if is_zip:
            return CheckpointUnsafeError(
                f"{str(path)!r} was not loaded: it builds its objects in a way that can run code "
                f"({weights_only_reason(error)}). If you trust its author, pass `weights_only=False`."
            )
    if isinstance(error, ImportError | AttributeError):
        return CheckpointError(
            f"{str(path)!r} holds an object whose class is not there any more ({error}). Make the class importable "
            "under its old name, or load the file where it is and save its state_dict() only."
        )
    if not is_zip and not isinstance(error, OSError):
        return CheckpointCorruptError(
            f"{str(path)!r} begins like a checkpoint of PyTorch before 1.6, but is truncated or damaged "
            f"({type(error).__name__}). Use another checkpoint."
        )
    reason = reason_of(error)
    return CheckpointError(f"The checkpoint {str(path)!r} is whole, but could not be restored. {reason}.")


_OBJECT_STORES: Final = {"gcsfs": "GCSFileSystem", "s3fs": "S3FileSystem", "adlfs": "AzureBlobFileSystem"}


def load_plain(path_or_url: PathLike | IO[bytes], map_location: Any = None, weights_only: bool | None = None) -> Any:
    """Read what ``torch.save`` wrote to a path, a URL or an open file.

    Args:
        path_or_url: Where it is.
        map_location: As for ``torch.load``.
        weights_only: False also unpickles objects, for files that you trust. Default: tensors and plain containers.
    """
    safe = weights_only is None or weights_only
    if not isinstance(path_or_url, (str, Path)):
        return torch.load(path_or_url, map_location=map_location, weights_only=safe)
    fs, where = file_system(path_or_url)
    if fs is None:
        return torch.load(where, map_location=map_location, weights_only=safe)
    return torch.load(io.BytesIO(fs.cat_file(where)), map_location=map_location, weights_only=safe)


def is_object_store(fs: Any) -> bool:
    """Whether a file system of fsspec is a store of objects, which has no folders."""
    return any(
        importlib.util.find_spec(package) is not None
        and isinstance(fs, getattr(importlib.import_module(package), name))
        for package, name in _OBJECT_STORES.items()
    )


def is_folder(fs: Any, path: PathLike, strict: bool = False) -> bool:
    """Whether a path is a folder; in a store of objects every path may be one, unless ``strict``."""
    if is_object_store(fs) and not strict:
        return True
    return bool(fs.isdir(path))


def is_local(path: PathLike) -> bool:
    """Whether a path is on this machine's file system: it has no protocol, or the protocol "file"."""
    return "://" not in str(path) or str(path).lower().startswith("file://")
