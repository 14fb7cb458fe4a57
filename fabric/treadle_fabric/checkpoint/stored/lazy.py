"""Checkpoints whose tensors are read where they are used."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

from treadle_fabric.checkpoint.reading import folder_at, read_folder
from treadle_fabric.checkpoint.stored.tensor import tensors_on_demand
from treadle_fabric.errors import CheckpointNotFoundError
from treadle_fabric.types import PathLike, Stateful

__all__ = [
    "load_lazily",
    "load_whole_folder",
    "move_state",
]


def load_lazily(filename: PathLike) -> Any:
    """Read a checkpoint whose tensors are read from the disk when they are used.

    The tensors of a file are mapped: they are ordinary tensors on the CPU, and the file must stay as it is. Those of a
    checkpoint folder are read whole at their first use. Nothing in the checkpoint is run.

    Args:
        filename: A file that ``torch.save`` wrote, or a checkpoint folder.

    Raises:
        CheckpointNotFoundError: Nothing lies there.
    """
    if (folder := folder_at(filename)) is not None:
        with tensors_on_demand():
            return read_folder(folder)
    if not os.path.isfile(filename):
        raise CheckpointNotFoundError(f"There is no checkpoint at {str(filename)!r}: give the path of one.")
    return torch.load(filename, map_location="cpu", mmap=True, weights_only=True)


def load_whole_folder(checkpoint_folder: PathLike) -> dict[str, Any]:
    """Read a checkpoint folder that several ranks wrote, with whole tensors.

    Raises:
        CheckpointNotFoundError: There is no folder.
    """
    if (folder := folder_at(checkpoint_folder)) is None:
        raise CheckpointNotFoundError(f"There is no checkpoint folder at {str(checkpoint_folder)!r}: give its path.")
    return read_folder(folder)


def move_state(source: dict[str, Any], destination: dict[str, Any], keys: Iterable[str] | None = None) -> None:
    """Move entries of one dictionary into another; an object there that has a state loads the entry as its state.

    Args:
        source: What is moved; the entries are taken out.
        destination: Where the entries go.
        keys: The names to move. Default: all.
    """
    for name in set(source) if keys is None else set(keys) & set(source):
        state = source.pop(name)
        if isinstance(held := destination.get(name), Stateful):
            held.load_state_dict(state)
        else:
            destination[name] = state
