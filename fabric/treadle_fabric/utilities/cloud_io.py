"""File systems, and files with a ``torch.save`` in them, where users of Lightning Fabric look for these."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import IO, Any

import torch

from treadle_fabric.checkpoint.torch_file import file_system, get_filesystem, save_file
from treadle_fabric.types import PathLike

__all__ = ["_atomic_save", "_is_dir", "_is_local_file_protocol", "_is_object_storage", "_load", "get_filesystem"]

_OBJECT_STORES = {"gcsfs": "GCSFileSystem", "s3fs": "S3FileSystem", "adlfs": "AzureBlobFileSystem"}


def _load(path_or_url: PathLike | IO[bytes], map_location: Any = None, weights_only: bool | None = None) -> Any:
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


def _atomic_save(checkpoint: dict[str, Any], filepath: PathLike) -> None:
    """Write a file that appears under its name whole, or not at all."""
    save_file(checkpoint, filepath)


def _is_object_storage(fs: Any) -> bool:
    """Whether a file system of fsspec is a store of objects, which has no folders."""
    return any(
        importlib.util.find_spec(package) is not None
        and isinstance(fs, getattr(importlib.import_module(package), name))
        for package, name in _OBJECT_STORES.items()
    )


def _is_dir(fs: Any, path: PathLike, strict: bool = False) -> bool:
    """Whether a path is a folder; in a store of objects every path may be one, unless ``strict``."""
    if _is_object_storage(fs) and not strict:
        return True
    return bool(fs.isdir(path))


def _is_local_file_protocol(path: PathLike) -> bool:
    """Whether a path is on this machine's file system: it has no protocol, or the protocol "file"."""
    return "://" not in str(path) or str(path).lower().startswith("file://")
