"""Media as files, in the folder ``media`` of a run: of a logger that has no other place for them."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from treadle_fabric.loggers.files import exists, write_file
from treadle_fabric.loggers.media import Figure, File, Images, Media, Table, Text

__all__ = ["as_files", "file_name", "write_media"]

# A file is written under a longer name first (a dot, 32 digits, ".tmp"), and file systems take 255 bytes
_LONGEST_NAME = 200
_ODD = re.compile(r"[\x00-\x1f\x7f<>:\"|?*\\%]")


def write_media(folder: str, media: Media) -> None:
    """Write media into ``folder/media``, each file whole or not at all.

    The name is ``<key>_<step>`` with an extension, and a number where there are several images; a ``/`` in the key
    makes a folder. A step that is logged again replaces its file; without a step, a number makes a new name.

    Args:
        folder: The folder of the run, a local path or an fsspec URL.
        media: What to write.
    """
    for name, content in as_files(media):
        path = f"{folder.rstrip('/')}/media/{name}"
        write_file(_free(path) if media.step is None else path, content)


def as_files(media: Media) -> Iterator[tuple[str, bytes]]:
    """Give the files that media make: a relative path for each, and its content."""
    if isinstance(media, Images):
        for i, image in enumerate(media.images):
            yield file_name(media, ".png", f"_{i}" if len(media.images) > 1 else ""), _png(image)
    elif isinstance(media, Figure):
        yield file_name(media, media.extension), media.encode()
    elif isinstance(media, Text):
        yield file_name(media, ".txt"), media.text.encode("utf-8", "backslashreplace")
    elif isinstance(media, Table):
        yield file_name(media, ".csv"), media.to_csv().encode("utf-8", "backslashreplace")
    elif isinstance(media, File):
        with open(media.path, "rb") as file:
            yield file_name(media), file.read()


def _png(image: Any) -> bytes:
    if image.mode not in ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"):  # what PNG has no form for, such as CMYK
        image = image.convert("RGB")
    image.save(file := io.BytesIO(), format="PNG")
    return file.getvalue()


def file_name(media: Media, extension: str | None = None, number: str = "") -> str:
    """Return a relative path that any file system takes; different keys give different paths."""
    key = media.key
    if extension is None:
        extension = os.path.splitext(media.path)[1] if isinstance(media, File) else ""
    if extension and key.lower().endswith(extension.lower()):
        key = key[: -len(extension)]
    end = ("" if media.step is None else f"_{media.step}") + number + extension
    *folders, last = [_part(part) for part in key.split("/")]
    return "/".join([*(_short(part, "") for part in folders), _short(last, end)])


def _part(part: str) -> str:
    """Quote what has a meaning in paths, and what some file systems refuse."""
    if part.startswith("."):
        part = f"%2E{_ODD.sub(_quoted, part[1:])}"
    else:
        part = _ODD.sub(_quoted, part)
    return part or "%"


def _quoted(match: re.Match[str]) -> str:
    return quote(match[0], safe="")


def _short(part: str, end: str) -> str:
    """Append ``end``, and cut a part that would have too many bytes; a digest keeps cut names apart."""
    if len((part + end).encode("utf-8", "surrogatepass")) <= _LONGEST_NAME:
        return part.encode("utf-8", "backslashreplace").decode() + end
    digest = hashlib.sha256(part.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    room = _LONGEST_NAME - len(end.encode()) - len(digest) - 1
    cut = part.encode("utf-8", "backslashreplace")[:room].decode("utf-8", "ignore")
    return f"{cut}-{digest}{end}"


def _free(path: str) -> str:
    stem, extension = os.path.splitext(path)
    n = 0
    while exists(path):
        n += 1
        path = f"{stem}-{n}{extension}"
    return path
