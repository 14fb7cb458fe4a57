"""The event files of a TensorBoard run: which there are, and how they are taken back to an earlier length."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any, Final

from treadle_fabric.loggers.files import file_system

__all__ = ["event_files", "newest_scalars", "rewind_events"]

_EVENTS: Final = "tfevents"  # TensorBoard reads every file with this word in its name
_SUPERSEDED: Final = "superseded"
_HEAD: Final = 24  # bytes of an event in which its step is: two tags, the time and a number of at most ten bytes


def event_files(folder: str, run_id: str, folders: Iterable[str] | None = None) -> dict[str, int]:
    """Return the sizes in bytes of the run's event files, by their paths below ``folder``.

    Args:
        folder: The folder of the run.
        run_id: Names the run; it is in the names of its files.
        folders: The folders that are known to have such files, charts of several lines have folders of their own.
            Default: they are looked for in all folders below ``folder``.
    """
    fs, where = file_system(folder)
    entries: dict[str, Any] = {}
    if folders is None:
        entries = fs.find(where, detail=True) if fs.exists(where) else {}
    for each in folders or ():
        with contextlib.suppress(FileNotFoundError):
            entries |= {info["name"]: info for info in fs.ls(file_system(each)[1], detail=True)}
    names = {path: os.path.basename(path) for path in entries}
    own = [path for path, name in names.items() if _EVENTS in name and f".{run_id}" in name]
    return {path[len(where) :].lstrip("/"): entries[path]["size"] for path in own}


def rewind_events(folder: str, run_id: str, sizes: Mapping[str, int]) -> int | None:
    """Take the run's event files back to the sizes that they had, and move what comes after to files beside them.

    Those are called ``...superseded...``, and TensorBoard does not read them. Each is written before anything is cut,
    and has a name that follows from what is cut: after a kill in between, the same call does what is left.

    Args:
        folder: The folder of the run.
        run_id: Names the run; it is in the names of its files.
        sizes: What :func:`event_files` returned when the checkpoint was saved.

    Returns:
        The step after the last one that is left, for readers that have read what is cut; None if nothing is cut, or the
        files are remote.
    """
    fs, where = file_system(folder)
    files = event_files(folder, run_id)
    longer = {name: size for name, size in files.items() if size > sizes.get(name, 0)}
    for name, size in longer.items():
        path, kept = f"{where.rstrip('/')}/{name}", sizes.get(name, 0)
        beside = os.path.basename(name).replace(_EVENTS, _SUPERSEDED)
        aside = os.path.join(os.path.dirname(path), f"{beside}.{kept}-{size}" if kept else beside)
        if not kept:
            fs.mv(path, aside)
        else:
            fs.pipe_file(aside, fs.cat_file(path, start=kept))
            _shorten(fs, path, kept)
    left = [f"{where.rstrip('/')}/{name}" for name in files if sizes.get(name)]
    if not longer or not _is_local(fs):
        return None
    return max((_last_step(path) for path in left), default=-1) + 1


def newest_scalars(folder: str, run_id: str, sizes: Mapping[str, int], event_class: Any) -> dict[str, list[Any]]:
    """Return the last step and value of each metric that the run's files have after the sizes in a checkpoint.

    Args:
        folder: The folder of the run.
        run_id: Names the run.
        sizes: What :func:`event_files` returned when the checkpoint was saved.
        event_class: Parses an event.
    """
    fs, where = file_system(folder)
    found: dict[str, list[Any]] = {}
    for name, size in sorted(event_files(folder, run_id).items()):
        if os.path.dirname(name) or size <= sizes.get(name, 0):  # charts of several lines lie in folders
            continue
        content, at = fs.cat_file(f"{where.rstrip('/')}/{name}", start=sizes.get(name, 0)), 0
        while at + 12 <= len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])
            record = content[at + 12 : at + 12 + length]
            if len(record) < length:  # cut off
                break
            event = event_class.FromString(record)
            found |= {v.tag: [event.step, v.simple_value] for v in event.summary.value if v.HasField("simple_value")}
            at += length + 16
    return found


def _shorten(fs: Any, path: str, size: int) -> None:
    if _is_local(fs):
        os.truncate(path, size)
    else:
        fs.pipe_file(path, fs.cat_file(path, end=size))


def _is_local(fs: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem  # heavy

    return isinstance(fs, LocalFileSystem)


def _last_step(path: str) -> int:
    """Return the greatest step of a file of records: length (8 bytes), its checksum (4), an event, its checksum (4)."""
    greatest = 0
    with open(path, "rb") as file:
        while len(head := file.read(12)) == 12:
            (length,) = struct.unpack("<Q", head[:8])
            greatest = max(greatest, _step_of(file.read(min(length, _HEAD))))
            file.seek(max(0, length - _HEAD) + 4, os.SEEK_CUR)
    return greatest


def _step_of(event: bytes) -> int:
    """Return the step of a serialized ``Event``: field 1 is the time (a double), field 2 the step (a varint)."""
    at, step = (9 if event[:1] == b"\x09" else 0), 0
    if event[at : at + 1] != b"\x10":
        return 0
    for place, byte in enumerate(event[at + 1 :]):
        step |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            break
    return step if step < 2**63 else step - 2**64
