"""A checkpoint that is a folder: its manifest, and how it takes its name whole or not at all.

The manifest is written last. It has the size and the CRC-32 of every other file, and where in them each piece of each
tensor lies, so that no index that would have to be unpickled is ever read; its own CRC-32 stands in its first line.

A folder is written under a hidden name and renamed. Where one bears the name already the two change places in one
system call; a system that cannot do that moves the old one aside first, and whoever looks for a checkpoint moves it
back if the new one never came.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, TypeVar

from treadle_fabric.errors import CheckpointCorruptError, CheckpointError

__all__ = [
    "MANIFEST",
    "PLAIN",
    "bring_back",
    "checksum",
    "forget_asides",
    "has_manifest",
    "is_sharded",
    "link_folder",
    "lock_folder",
    "make_temporary",
    "put_in_place",
    "read_manifest",
    "refuse_foreign",
    "remove_folder",
    "representative",
    "size_of",
    "sync_folder",
    "unmixed",
    "verify",
    "write_manifest",
]

T = TypeVar("T")
MANIFEST: Final = "manifest.json"
PLAIN: Final = "meta.pt"
"""The file of everything but the large tensors."""
_INDEX: Final = ".metadata"
"""What torch.distributed.checkpoint would read. It is a pickle; here nobody does."""
_PART: Final = re.compile(r"manifest\.json|meta\.pt|\.metadata|__\d+_\d+\.distcp")
_VERSION: Final = 1
_READS: Final = 5
_CHUNK: Final = 4 * 1024 * 1024
_HEAD: Final = re.compile(rb'\{"crc32": "([0-9a-f]{8})",\n')
_ASIDE: Final = re.compile(r"\.(.+)\.[0-9a-f]{32}\.old")
_STALE_S: Final = 6 * 3600.0
"""Long, because other machines do not see the lock on every file system."""
_TAKEN: Final = (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR)


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether a local path is a folder that is, or was, one checkpoint; parts of it may be missing."""
    if has_manifest(path):
        return True
    try:
        marked = any(os.path.isfile(os.path.join(path, name)) for name in (PLAIN, _INDEX))
        return marked and _foreign_in(path) is None  # a user's own folder may have files of such names
    except OSError:  # gone meanwhile, or not to be listed
        return False


def has_manifest(path: str | os.PathLike[str]) -> bool:
    """Whether a local path is a folder with a manifest of ours, be it damaged."""
    try:
        with open(os.path.join(path, MANIFEST), "rb") as file:  # many a folder has a file of that name
            return _HEAD.match(file.read(32)) is not None
    except OSError:
        return False


def refuse_foreign(path: str) -> None:
    """Make sure that no more than a checkpoint is lost when what lies at ``path`` is replaced or removed.

    Raises:
        CheckpointError: It is a folder that is no checkpoint, or that holds other things, too.
    """
    if not _is_folder(path):
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
    """Something in a folder that is no part of a checkpoint."""
    with os.scandir(path) as entries:
        strange = (e.name for e in entries if e.is_dir(follow_symlinks=False) or not _PART.fullmatch(e.name))
        return next(strange, None)


def representative(path: str | os.PathLike[str]) -> str:
    """The file whose identity and time count as those of the checkpoint at ``path``: itself, or its manifest."""
    manifest = os.path.join(path, MANIFEST)
    return manifest if os.path.isfile(manifest) else os.fspath(path)


def unmixed(path: str, name: str, read: Callable[[], T], anywhere: Callable[[bool], bool] = bool) -> T:
    """What ``read`` finds in the folder ``path``, all of it from one checkpoint.

    If another one took the name meanwhile, what was read, or what was found to be damaged, may be a part of this and a
    part of that; so it is read again.

    Args:
        path: Where.
        name: What the user calls it.
        read: Reads all of it.
        anywhere: Where several processes read together: makes their answers one, True if any is.

    Raises:
        CheckpointError: What ``read`` raised, or time and again another one took the name.
    """
    for _ in range(_READS):
        before = _identity(path)
        try:
            found = read()
        except CheckpointError:
            if not anywhere(_identity(path) != before):
                raise
        else:
            if not anywhere(_identity(path) != before):
                return found
    raise CheckpointError(
        f"{name!r} could not be read: another checkpoint took its place {_READS} times meanwhile. Load it when nobody "
        "saves to it, or another one."
    )


def _identity(path: str) -> tuple[int, ...] | None:
    """Differs where another checkpoint has the name; a second name for this one does not change it."""
    try:
        status = os.stat(representative(path))
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def size_of(path: str | os.PathLike[str]) -> int:
    """Bytes of a checkpoint, be it a file or a folder."""
    if not os.path.isdir(path):
        return os.stat(path).st_size
    return sum(entry.stat().st_size for entry in os.scandir(path))


# --- the manifest ---


def checksum(path: str) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def write_manifest(
    folder: str, world_size: int, files: Mapping[str, tuple[int, int]], tensors: Mapping[str, Any]
) -> None:
    """Write the manifest of a folder in which all else is written, and flush it.

    Args:
        folder: Where.
        world_size: How many processes wrote.
        files: Size and CRC-32 of every file.
        tensors: For each tensor its ``dtype``, ``shape`` and ``chunks``; a chunk has ``offsets`` and ``sizes`` in the
            tensor, and lies in ``file`` from byte ``start`` on, for ``length`` bytes.
    """
    content = {
        "format": "treadle-sharded",
        "version": _VERSION,
        "world_size": world_size,
        "files": {name: {"size": size, "crc32": f"{crc:08x}"} for name, (size, crc) in sorted(files.items())},
        "tensors": tensors,
    }
    body = json.dumps(content, separators=(",", ":"))[1:].encode()
    with open(os.path.join(folder, MANIFEST), "xb") as file:
        file.write(b'{"crc32": "%08x",\n' % zlib.crc32(body) + body)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read_manifest(folder: str, path: str) -> dict[str, Any]:
    """The manifest of a folder; ``path`` is what the user calls it.

    Raises:
        CheckpointCorruptError: It is missing, damaged, or of a format that is not known.
    """
    try:
        with open(os.path.join(folder, MANIFEST), "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        raise CheckpointCorruptError(
            f"{path!r} is a folder, and no sharded checkpoint of Treadle that was written to the end: {MANIFEST!r} is "
            "missing in it. Give a checkpoint in it, or use another one."
        ) from None
    except OSError as e:
        raise CheckpointError(f"{MANIFEST!r} of {path!r} could not be read: {e.strerror}.") from e
    head = _HEAD.match(raw)
    if head is None or zlib.crc32(raw[head.end() :]) != int(head[1], 16):
        raise CheckpointCorruptError(
            f"{path!r} is damaged: the checksum of {MANIFEST!r} is wrong. The disk or a copy changed it, or another "
            "program wrote it. Use another checkpoint."
        )
    try:
        content = json.loads(raw)
        known = content["format"] == "treadle-sharded" and content["version"] == _VERSION
        if known:
            _check_content(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        reason = str(e) if isinstance(e, ValueError) else repr(e)
        raise CheckpointCorruptError(
            f"{MANIFEST!r} of {path!r} is no manifest: {reason}. Use another checkpoint."
        ) from e
    if not known:
        raise CheckpointCorruptError(
            f"{path!r} has version {content['version']!r} of the format {content['format']!r}, and version {_VERSION} "
            "of 'treadle-sharded' is known here. Load it with the release that wrote it."
        )
    return dict(content)


def _check_content(content: Mapping[str, Any]) -> None:
    """Raises one of the errors of what is not there, or not what it should be, where a manifest cannot be followed."""
    files, tensors = content["files"], content["tensors"]
    for name, file in files.items():
        if not _PART.fullmatch(name) or name == MANIFEST:
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


def verify(folder: str, path: str, manifest: Mapping[str, Any], names: Collection[str] | None = None) -> None:
    """Read every byte of the files in a manifest, or of those named.

    Raises:
        CheckpointCorruptError: One of them is missing, has another size, or is damaged; it is named.
    """
    for name, expected in manifest["files"].items():
        if names is not None and name not in names:
            continue
        file = os.path.join(folder, name)
        try:
            size = os.stat(file).st_size
            if size != expected["size"]:
                raise CheckpointCorruptError(
                    f"{path!r} is damaged: its file {name!r} has {size} bytes instead of {expected['size']}. The copy "
                    "was cut off, or another program wrote to it. Use another checkpoint."
                )
            good = checksum(file)[1] == int(expected["crc32"], 16)
        except FileNotFoundError:
            raise CheckpointCorruptError(
                f"{path!r} is not whole: its file {name!r} is missing. Copy the whole folder, or use another "
                "checkpoint."
            ) from None
        except OSError as e:
            raise CheckpointError(f"The file {name!r} of {path!r} could not be read: {e.strerror}.") from e
        if not good:
            raise CheckpointCorruptError(
                f"{path!r} is damaged: the checksum of its file {name!r} is wrong. The disk or a copy changed it. Use "
                "another checkpoint."
            )


# --- taking a name ---


def make_temporary(path: str) -> str:
    """Make an empty folder beside ``path``, hidden, for what is to be put in its place."""
    parent, name = os.path.split(path)
    os.makedirs(parent, exist_ok=True)
    _remove_stale(parent)
    temporary = os.path.join(parent, f".{name[:80]}.{uuid.uuid4().hex}.tmp")
    os.mkdir(temporary)
    return temporary


def lock_folder(folder: str) -> int | None:
    """Mark a temporary folder as one that is being written, for as long as this process lives.

    Returns:
        A file descriptor, to be closed at the end; None where the system has no such locks.
    """
    descriptor = None
    try:
        import fcntl  # not on Windows

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _remove_stale(parent: str) -> None:
    """Remove what killed processes left half written: temporary folders that nobody holds a lock on any more."""
    with contextlib.suppress(OSError):
        left = [e.path for e in os.scandir(parent) if re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", e.name) and e.is_dir()]
        for folder in left:
            changed = max(os.stat(each).st_mtime for each in (folder, *(e.path for e in os.scandir(folder))))
            if time.time() - changed < _STALE_S:
                continue
            descriptor = lock_folder(folder)
            if descriptor is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)


def put_in_place(fresh: str, at: str) -> None:
    """Give what lies at ``fresh`` the name ``at``; what bore it before, file or folder, is removed.

    Whenever the process is killed, ``at`` is the old one or the new one, or :func:`bring_back` makes it the old one.

    Raises:
        CheckpointError: ``at`` is a folder with more in it than a checkpoint, and stays as it is.
        OSError: It cannot be done. ``at`` is what it was.
    """
    for attempt in range(5):
        refuse_foreign(at)
        try:
            if os.path.lexists(at) and (_is_folder(at) or _is_folder(fresh)):  # else one rename does it
                if not _exchange(fresh, at):
                    _move_aside(fresh, at)
            else:
                os.replace(fresh, at)
            break
        except OSError as e:  # somebody else's bring_back came between
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
    parent, name = os.path.split(at)
    aside = os.path.join(parent, f".{name}.{uuid.uuid4().hex}.old")
    os.rename(at, aside)
    try:
        os.rename(fresh, at)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rename(aside, at)
        raise


def bring_back(parent: str | os.PathLike[str]) -> None:
    """Where a process was killed while it replaced a checkpoint in ``parent``, give the old one its name again."""
    try:
        entries = os.listdir(parent)
    except OSError:
        return
    for entry in entries:
        if (found := _ASIDE.fullmatch(entry)) and found[1] not in entries:
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(os.path.join(parent, entry), os.path.join(parent, found[1]))


def remove_folder(path: str) -> None:
    """Delete the folder of a checkpoint; from the first moment on nothing lies at ``path``, rather than a part of it.

    Raises:
        CheckpointError: It holds more than a checkpoint, or is none. Nothing was deleted.
        OSError: It cannot be done.
    """
    refuse_foreign(path)
    parent, name = os.path.split(os.path.abspath(path))
    aside = os.path.join(parent, f".{name[:80]}.{uuid.uuid4().hex}.tmp")
    forget_asides(path)
    os.rename(path, aside)
    try:
        shutil.rmtree(aside)
    except FileNotFoundError:  # another process found it stale, and removes it, too
        shutil.rmtree(aside, ignore_errors=True)


def forget_asides(path: str) -> None:
    """Remove what a killed process had moved aside for ``path``, which came or is to go: it must not come back."""
    parent, name = os.path.split(os.path.abspath(path))
    with contextlib.suppress(OSError):
        for entry in os.listdir(parent):
            if (found := _ASIDE.fullmatch(entry)) and found[1] == name:
                _delete(os.path.join(parent, entry))


def _is_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _delete(path: str) -> None:
    if _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.remove(path)


def link_folder(target: str, link: str) -> None:
    """Make ``link`` a folder of its own with the files of ``target``, hard links that take no room.

    Raises:
        CheckpointError: ``link`` is a folder with more in it than a checkpoint, and stays as it is.
        OSError: Links cannot be made there. ``link`` is what it was.
    """
    fresh = make_temporary(os.path.abspath(link))
    lock = lock_folder(fresh)
    try:
        names = sorted(filter(_PART.fullmatch, os.listdir(target)), key=lambda name: name == MANIFEST)
        for name in names:
            os.link(os.path.join(target, name), os.path.join(fresh, name))
        sync_folder(fresh)
        put_in_place(fresh, os.path.abspath(link))
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def sync_folder(folder: str) -> None:
    """Make the names in a folder survive a power cut, where the system lets us."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
