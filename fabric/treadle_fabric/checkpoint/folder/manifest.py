"""The manifest of a checkpoint folder: which files belong to it, and their checksums.

The manifest is written last. It has the size and the CRC-32 of every other file, and where in them each piece of each
tensor lies, so that no index that would have to be unpickled is ever read; its own CRC-32 is in its first line.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from treadle_fabric.checkpoint.folder.layout import HEAD, MANIFEST, PART, PLAIN
from treadle_fabric.checkpoint.folder.source import FolderSource
from treadle_fabric.errors import CheckpointCorruptError, CheckpointError

__all__ = ["manifest_of", "prefix_in", "read_manifest", "sync_folder", "verify"]
_VERSION: Final = 2
_VERSION_WITH_PREFIX: Final = 3
_READ: Final = (1, 2, 3)  # version 1 has no files of single ranks
_PREFIX: Final = re.compile(r"(?:[0-9A-Za-z][0-9A-Za-z_-]*/)?")


# --- the manifest ---


def manifest_of(
    world_size: int, files: Mapping[str, tuple[int, int]], tensors: Mapping[str, Any], prefix: str = ""
) -> bytes:
    """The manifest of a folder, as it is written.

    Args:
        world_size: How many processes wrote.
        files: Size and CRC-32 of every file.
        tensors: For each tensor its ``dtype``, ``shape`` and ``chunks``; a chunk has ``offsets`` and ``sizes`` in the
            tensor, and lies in ``file`` from byte ``start`` on, for ``length`` bytes.
        prefix: What comes before the name of each file.
    """
    content = {
        "format": "treadle-sharded",
        "version": _VERSION_WITH_PREFIX if prefix else _VERSION,
        "world_size": world_size,
        **({"prefix": prefix} if prefix else {}),
        "files": {name: {"size": size, "crc32": f"{crc:08x}"} for name, (size, crc) in sorted(files.items())},
        "tensors": tensors,
    }
    body = json.dumps(content, separators=(",", ":"))[1:].encode()
    return b'{"crc32": "%08x",\n' % zlib.crc32(body) + body


def prefix_in(raw: bytes) -> str | None:
    """The prefix of the files of a manifest; None where this is none."""
    if HEAD.match(raw) is None:
        return None
    try:
        return str(json.loads(raw).get("prefix", ""))
    except (ValueError, AttributeError):
        return None


def read_manifest(source: FolderSource) -> dict[str, Any]:
    """The manifest of a folder. ``source`` then finds the files under the names that the manifest gives them.

    Raises:
        CheckpointCorruptError: It is missing, damaged, or of a format that is not known.
    """
    path = source.name
    try:
        raw = source.read(MANIFEST)
    except (FileNotFoundError, EOFError):
        raise CheckpointCorruptError(
            f"{path!r} is a folder, and no sharded checkpoint of Treadle that was written to the end: {MANIFEST!r} is "
            "missing in it. Give a checkpoint in it, or use another one."
        ) from None
    except OSError as e:
        raise CheckpointError(f"{MANIFEST!r} of {path!r} could not be read: {e.strerror or e}.") from e
    content = _manifest_in(raw, path)
    source.prefix = content.get("prefix", "")
    return content


def _manifest_in(raw: bytes, path: str) -> dict[str, Any]:
    head = HEAD.match(raw)
    if head is None or zlib.crc32(raw[head.end() :]) != int(head[1], 16):
        raise CheckpointCorruptError(
            f"{path!r} is damaged: the checksum of {MANIFEST!r} is wrong. The disk or a copy changed it, or another "
            "program wrote it. Use another checkpoint."
        )
    try:
        content = json.loads(raw)
        known = content["format"] == "treadle-sharded" and content["version"] in _READ
        if known:
            _check_content(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        reason = str(e) if isinstance(e, ValueError) else repr(e)
        raise CheckpointCorruptError(
            f"{MANIFEST!r} of {path!r} is no manifest: {reason}. Use another checkpoint."
        ) from e
    if not known:
        raise CheckpointCorruptError(
            f"{path!r} has version {content['version']!r} of the format {content['format']!r}, and versions up "
            f"to {_READ[-1]} of 'treadle-sharded' are known here. Load it with the release that wrote it."
        )
    return dict(content)


def _check_content(content: Mapping[str, Any]) -> None:
    """Raise a ValueError, KeyError, TypeError or AttributeError if the content of a manifest is not consistent."""
    files, tensors, world_size = content["files"], content["tensors"], content["world_size"]
    if type(world_size) is not int or not 1 <= world_size < 2**24:
        raise ValueError(f"the number of its processes is {world_size!r}")
    if not _PREFIX.fullmatch(content.get("prefix", "")):
        raise ValueError(f"the names of its files begin with {content['prefix']!r}")
    for name, file in files.items():
        if not PART.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"{name!r} is not one of its files")
        if not _are_sizes([file["size"]]) or not re.fullmatch("[0-9a-f]{8}", file["crc32"]):
            raise ValueError(f"size and checksum of {name!r} are {file!r}")
    if PLAIN not in files:
        raise ValueError(f"{PLAIN!r} is not one of its files")
    for name, tensor in tensors.items():
        shape, chunks = tensor["shape"], tensor["chunks"]
        if not isinstance(tensor["dtype"], str) or not isinstance(shape, list) or not _are_sizes(shape):
            raise ValueError(f"dtype and shape of {name!r} are {tensor['dtype']!r} and {shape!r}")
        for chunk in chunks:
            offsets, sizes, start, length = (chunk[key] for key in ("offsets", "sizes", "start", "length"))
            if not (len(offsets) == len(sizes) == len(shape) and _are_sizes([*offsets, *sizes, start, length])):
                raise ValueError(f"a part of {name!r} is {chunk!r}")
            if chunk["file"] not in files or start + length > files[chunk["file"]]["size"]:
                raise ValueError(f"a part of {name!r} lies outside of {chunk['file']!r}")
            if any(offset + size > whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)):
                raise ValueError(f"a part of {name!r} lies outside of it")
        if sum(math.prod(chunk["sizes"]) for chunk in chunks) != math.prod(shape) or _overlap(chunks):
            raise ValueError(f"the parts of {name!r} are not all of it, each once")


def _are_sizes(values: Sequence[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _overlap(chunks: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two pieces have an element in common."""
    boxes = [tuple(zip(c["offsets"], c["sizes"], strict=True)) for c in chunks if math.prod(c["sizes"])]
    if len(boxes) < 2:
        return False
    if not boxes[0]:  # a tensor of one value
        return True
    # in the order of the dimension that is cut most often few pieces lie side by side
    dim = max(range(len(boxes[0])), key=lambda d: len({box[d] for box in boxes}))
    beside: list[tuple[tuple[int, int], ...]] = []
    for box in sorted(boxes, key=lambda box: box[dim]):
        beside = [other for other in beside if sum(other[dim]) > box[dim][0]]
        for other in beside:
            if all(a < b + m and b < a + n for (a, n), (b, m) in zip(box, other, strict=True)):
                return True
        beside.append(box)
    return False


def verify(source: FolderSource, manifest: Mapping[str, Any], names: Collection[str] | None = None) -> None:
    """Read every byte of the files in a manifest, or of the files in ``names``.

    Raises:
        CheckpointCorruptError: A file is missing, has another size, or is damaged; the message names it.
    """
    path = source.name
    for name, expected in manifest["files"].items():
        if names is not None and name not in names:
            continue
        try:
            size = source.size(name)
            if size != expected["size"]:
                raise CheckpointCorruptError(
                    f"{path!r} is damaged: its file {name!r} has {size} bytes instead of {expected['size']}. The copy "
                    "was cut off, or another program wrote to it. Use another checkpoint."
                )
            good = functools.reduce(lambda crc, part: zlib.crc32(part, crc), source.parts(name), 0)
        except FileNotFoundError:
            raise CheckpointCorruptError(
                f"{path!r} is not whole: its file {name!r} is missing. Copy the whole folder, or use another "
                "checkpoint."
            ) from None
        except (OSError, EOFError) as e:
            reason = getattr(e, "strerror", None) or e
            raise CheckpointError(f"The file {name!r} of {path!r} could not be read: {reason}.") from e
        if good != int(expected["crc32"], 16):
            raise CheckpointCorruptError(
                f"{path!r} is damaged: the checksum of its file {name!r} is wrong. The disk or a copy changed it. Use "
                "another checkpoint."
            )


def sync_folder(folder: str) -> None:
    """Make the names in a folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
