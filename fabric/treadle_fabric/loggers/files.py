"""Small files at a local path or an fsspec URL."""

from __future__ import annotations

import os
import uuid
from typing import Any

__all__ = ["exists", "file_system", "read_file", "write_file"]


def file_system(path: str) -> tuple[Any, str]:
    """Return the file system that a local path or a URL belongs to, and the path in it."""
    import fsspec  # heavy

    fs, where = fsspec.url_to_fs(path, use_listings_cache=False)  # another run may have made a folder since
    return fs, where


def exists(path: str) -> bool:
    """Tell whether there is something at a local path or a URL."""
    fs, where = file_system(path)
    return bool(fs.exists(where))


def read_file(path: str) -> bytes | None:
    """Return what a local or remote file holds; None if there is no such file."""
    fs, where = file_system(path)
    try:
        return bytes(fs.cat_file(where))
    except FileNotFoundError:
        return None


def write_file(path: str, content: bytes) -> None:
    """Write a small file at a local path or a URL, whole or not at all; its folder is made."""
    from fsspec.implementations.local import LocalFileSystem  # heavy

    fs, where = file_system(path)
    parent, name = where.rsplit("/", 1)
    fs.makedirs(parent, exist_ok=True)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(where, content)
        return
    temporary = f"{parent}/.{name}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, where)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
