"""``treadle checkpoint convert``: make a checkpoint that always loads of one that needs ``weights_only=False``."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from treadle.formats import modernize
from treadle_fabric import CheckpointError, CheckpointMismatchError, MisconfigurationException
from treadle_fabric.checkpoint import Absent, Keeping, TorchCheckpointIO, absent_allowed, pack, unpack

__all__ = ["add_convert_command"]


def add_convert_command(actions: Any) -> None:
    """Add ``convert`` to the actions of ``treadle checkpoint``."""
    parser = actions.add_parser(
        "convert",
        help="make a file that loads without running code of a pickle that you trust, or of Lightning 1",
        description=(
            "Read a checkpoint of any release of Lightning and write one that loads with weights_only=True, in the keys"
            " of Lightning 2. This RUNS CODE THAT THE FILE HOLDS: only convert files whose author you trust. What is"
            " still pickled in the new file, in a part of its own, and what was dropped is listed."
        ),
    )
    parser.add_argument("source", metavar="SRC", help="the checkpoint, whose code is run")
    parser.add_argument("target", metavar="DST", help="the file to write; it must not be there yet")
    parser.set_defaults(run=_convert)


def _convert(given: Namespace) -> int:
    if os.path.exists(given.target):
        raise MisconfigurationException(f"{given.target!r} is there already: give a path where there is nothing.")
    print(f"{given.source}: its pickle is run, if it has one.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where the classes of the user's program are
    io = TorchCheckpointIO()
    with absent_allowed():
        content: Any = io.load_checkpoint(given.source, "cpu", weights_only=False)
        if isinstance(content, dict):
            content = unpack(content, given.source, weights_only=False, map_location="cpu")
    if not isinstance(content, dict):
        raise CheckpointMismatchError(
            f"{given.source} holds a {type(content).__name__}, not the dictionary of a checkpoint."
        )
    checkpoint = modernize(content)
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        if key in checkpoint:
            held = checkpoint[key]
            checkpoint[key] = dict(held) if isinstance(held, Mapping) else dict(vars(held))
    dropped = dict(_absent_in(checkpoint))
    packed = pack(_without(checkpoint), Keeping(lenient=True, name=""))
    io.save_checkpoint(packed.content, given.target)
    _check(io, given.target)
    lists = (("kept pickled", packed.pickled), ("dropped, because it has no pickle", packed.left_out))
    for what, places in (*lists, ("dropped, because its class cannot be imported here", dropped)):
        for place, kind in places.items():
            print(f"  {what}: {place} ({kind})")
    if packed.pickled:
        print("  Only a load with `weights_only=False` reads what is kept pickled; any other load gives all the rest.")
    print(f"{given.target}: loads with weights_only=True")
    return 0


def _check(io: TorchCheckpointIO, path: str) -> None:
    try:
        io.load_checkpoint(path, "cpu")
    except CheckpointError:
        io.remove_checkpoint(path)
        raise


def _absent_in(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the places of what is not there, and its class."""
    if _is_absent(value):
        cls = value if isinstance(value, type) else type(value)
        yield path, f"{cls.__module__}.{cls.__qualname__}"
    elif isinstance(value, Mapping):
        for key, each in value.items():
            name = key.__qualname__ if isinstance(key, type) else str(key)
            yield from _absent_in(each, f"{path}.{name}" if path else name)
    elif isinstance(value, list | tuple | set):
        for i, each in enumerate(value):
            yield from _absent_in(each, f"{path}[{i}]")


def _without(value: Any) -> Any:
    """Return a value without what is not there: entries of dictionaries are left out, elements are None."""
    if isinstance(value, dict):
        kept = {key: _without(each) for key, each in value.items() if not _is_absent(each)}
        return kept if type(value) is dict else type(value)(kept)
    if type(value) in (list, tuple):
        return type(value)(None if _is_absent(each) else _without(each) for each in value)
    return value


def _is_absent(value: Any) -> bool:
    return isinstance(value, Absent) or (isinstance(value, type) and issubclass(value, Absent))
