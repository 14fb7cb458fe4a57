"""``treadle checkpoint verify|inspect|diff|prune|convert``, for files and folders.

Only ``convert`` runs code that a file holds, which is what it is for.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from treadle.cli.convert import add_convert_command
from treadle_fabric import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from treadle_fabric.checkpoint import (
    TorchCheckpointIO,
    checkpoints_in,
    files_mapped,
    names_of,
    pickled_in,
    read_outline,
    size_of,
    written_at,
)

__all__ = ["add_checkpoint_commands"]

_INTERNAL: Final = ("treadle.", "loops.")
_PICKLED: Final = "treadle.values.pickled"


def add_checkpoint_commands(commands: Any) -> None:
    """Add ``checkpoint`` and what it can do to the subparsers of a command line."""
    parser = commands.add_parser("checkpoint", help="look at checkpoints, check them, tidy them up")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    verify = actions.add_parser("verify", help="read every byte; exit status 1 if something is wrong")
    verify.add_argument("paths", nargs="+", metavar="PATH", help="a checkpoint, or a folder of them")
    verify.set_defaults(run=_verify)

    inspect = actions.add_parser("inspect", help="what a checkpoint holds")
    inspect.add_argument("path", metavar="PATH")
    inspect.set_defaults(run=_inspect)

    diff = actions.add_parser("diff", help="where two checkpoints differ; exit status 1 if they do")
    diff.add_argument("a", metavar="A")
    diff.add_argument("b", metavar="B")
    diff.add_argument("--all", action="store_true", help="also list what is kept only for going on exactly")
    diff.set_defaults(run=_diff)

    prune = actions.add_parser(
        "prune", help="remove all checkpoints of a folder but the newest that training can go on from"
    )
    prune.add_argument("folder", metavar="DIR")
    prune.add_argument("--keep", type=_positive, required=True, metavar="N", help="how many of them stay, from 1")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    prune.set_defaults(run=_prune)
    add_convert_command(actions)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be an integer of at least 1: the newest good checkpoint always stays."
        )
    return number


# --- verify ---


def _verify(given: argparse.Namespace) -> int:
    bad = 0
    for path in given.paths:
        found = [p for p, _ in checkpoints_in(path)] if os.path.isdir(path) else [Path(path)]
        if not found:
            print(f"{path}: no checkpoint in this folder")
            bad += 1
        for each in found:
            try:
                read_outline(each)
            except CheckpointError as e:
                print(f"{each}: BAD. {e}")
                bad += 1
            else:
                print(f"{each}: good, {_size(size_of(each))}")
    return 1 if bad else 0


# --- inspect ---


def _inspect(given: argparse.Namespace) -> int:
    outline = read_outline(given.path)
    written = datetime.fromtimestamp(written_at(given.path) / 1e9)
    kind = "folder" if os.path.isdir(given.path) else "file"
    _line(kind, f"{given.path}, {_size(size_of(given.path))}, {written:%Y-%m-%d %H:%M:%S}")
    for name, key in (("epoch", "epoch"), ("global step", "global_step")):
        if key in outline:
            _line(name, outline[key])
    if "pytorch-lightning_version" in outline:
        _line("format", f"Lightning {outline['pytorch-lightning_version']}")
    _line("written by", "Treadle" if "treadle" in outline else "another program")
    if isinstance(weights := outline.get("state_dict"), Mapping):
        tensors = [value for _, value in _leaves(weights) if isinstance(value, Tensor)]
        kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
        _line("weights", f"{len(tensors)} tensors, {sum(t.numel() for t in tensors):,} values, {kinds or 'none'}")
    if ranks := (outline.get("treadle") or {}).get("ranks"):
        _line("processes", len(ranks))
    if callbacks := outline.get("callbacks"):
        _line("callbacks", ", ".join(str(key) for key in callbacks))
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        if found := outline.get(key):
            _line(key.replace("_", " "), ", ".join(f"{k}={v!r}" for k, v in found.items()))
    if pickled := pickled_in(outline):
        _line("pickled", ", ".join(f"{place} ({kind})" for place, kind in pickled.items()))
        _line("", "Only a load with `weights_only=False` reads these values, and it runs code of the checkpoint.")
    print("keys")
    for key, value in outline.items():
        size = sum(v.nbytes for _, v in _leaves(value) if isinstance(v, Tensor))
        print(f"  {key:<28} {_size(size) if size else _short(value)}")
    if isinstance(weights, Mapping):
        print("tensors of state_dict")
        for name, value in weights.items():
            if isinstance(value, Tensor):
                print(f"  {name:<28} {_describe(value)}, {_size(value.nbytes)}")
    return 0


def _line(name: str, value: object) -> None:
    print(f"{name:<18} {value}")


# --- diff ---


def _diff(given: argparse.Namespace) -> int:
    with files_mapped():
        return _print_diff(given)


def _print_diff(given: argparse.Namespace) -> int:
    io = TorchCheckpointIO()
    a, b = (_entries(io.load_checkpoint(path)) for path in (given.a, given.b))
    different = hidden = 0
    for key in [*a, *(key for key in b if key not in a)]:
        if key not in b:
            text = f"only in {given.a}"
        elif key not in a:
            text = f"only in {given.b}"
        else:
            text = _difference(a[key], b[key])
        if text:
            different += 1
            if key.startswith(_INTERNAL) and not given.all:
                hidden += 1
            else:
                print(f"{key}: {text}")
    if hidden:
        print(f"{hidden} more in {', '.join(_INTERNAL)}, which a run keeps for going on exactly: --all lists them.")
    print(f"{different} of {len(a.keys() | b.keys())} entries differ." if different else "No difference.")
    return 1 if different else 0


def _entries(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """All entries by path, and in the place of each pickled value what it is: the values are not unpickled."""
    entries = dict(_leaves(checkpoint)) | pickled_in(checkpoint)
    if _PICKLED in entries:
        entries["pickled part"] = entries.pop(_PICKLED)
    return entries


def _difference(a: Any, b: Any) -> str:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        same = type(a) is type(b) and (a == b or (a != a and b != b))
        return "" if same else f"{_short(a)} -> {_short(b)}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{_describe(a)} -> {_describe(b)}"
    if a.layout != torch.strided or b.layout != torch.strided or a.is_quantized:
        return "" if torch.equal(a, b) else "other values"
    unequal = ~torch.isclose(a, b, rtol=0, atol=0, equal_nan=True) if a.is_floating_point() else a != b
    count = int(unequal.sum())
    if not count:
        return ""
    wide = torch.complex128 if a.is_complex() else torch.float64
    delta = (a[unequal].to(wide) - b[unequal].to(wide)).abs()
    largest, mean = float(delta.max()), float(delta.mean())
    return f"{count:,} of {a.numel():,} values differ, by {largest:.4g} at most, {mean:.4g} on average"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that is no container, by its path; an empty container counts too."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    if not items:
        yield path, value
    for key, each in items:
        yield from _leaves(each, f"{path}.{key}" if path else str(key))


# --- prune ---


def _prune(given: argparse.Namespace) -> int:
    if not os.path.isdir(given.folder):
        raise CheckpointNotFoundError(f"{given.folder!r} is no folder: give the one that holds the checkpoints.")
    good = 0
    surplus: list[Path] = []
    for path, _ in checkpoints_in(given.folder, recursive=False):
        try:
            outline = read_outline(path)
        except CheckpointCorruptError as e:
            if _was_checkpoint(path):
                print(f"BAD     {e}")
                surplus.append(path)
            else:
                print(f"keep    {path}: {e}")
            continue
        except CheckpointError as e:  # whole perhaps, but not ours to judge
            print(f"keep    {path}: {e}")
            continue
        if "state_dict" in outline and "optimizer_states" not in outline:
            print(f"keep    {path}: it holds weights only, training cannot go on from it, so it does not count")
        elif good < given.keep:
            good += 1
            print(f"keep    {path}")
        else:
            surplus.append(path)
    if not good:
        print(
            "There is no good checkpoint in this folder that training can go on from, so nothing was removed.",
            file=sys.stderr,
        )
        return 1
    for path in surplus:
        for name in names_of(path):
            print(f"{'would remove' if given.dry_run else 'remove '} {name}")
            if not given.dry_run:
                TorchCheckpointIO().remove_checkpoint(name)
    return 0


def _was_checkpoint(path: Path) -> bool:
    """Whether a file or folder that cannot be read is the remains of a checkpoint, and not another program's file."""
    if path.is_dir():
        return True
    with open(path, "rb") as file:
        head = file.read(4)
    return head == b"PK\x03\x04" or not head.strip(b"\0")


# --- how things are shown ---


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return _describe(value)
    if isinstance(value, Mapping | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
