"""The tensors of a checkpoint folder of ours that DeepSpeed keeps in its files."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from treadle_fabric.checkpoint.folder.layout import ENGINE_TAG, identity_of
from treadle_fabric.checkpoint.folder.source import FolderSource, LocalSource
from treadle_fabric.checkpoint.stored.tensor import StoredTensor, stored_tensors
from treadle_fabric.checkpoint.zero.files import load_engine_file
from treadle_fabric.checkpoint.zero.partitions import Flat, FlatContent, Partitions
from treadle_fabric.errors import CheckpointCorruptError

__all__ = ["engine_tensors", "state_key", "weight_key"]

_WEIGHT, _STATE = "weight", "state"


def weight_key(name: str) -> str:
    """The name under which the content of a parameter is found."""
    return f"{_WEIGHT}/{name}"


def state_key(name: str, key: str) -> str:
    """The name under which an entry of the optimizer's state of a parameter is found."""
    return f"{_STATE}/{key}/{name}"


def engine_tensors(source: FolderSource, files: Iterable[str], stand_ins: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The content of stand-ins, by their ``id``: read now, or when it is used.

    Args:
        source: The folder, whose files are checked.
        files: The names of all files in it.
        stand_ins: By the names of :func:`weight_key` and :func:`state_key`.
    """
    prefix = f"{ENGINE_TAG}/"
    names = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]

    @functools.cache
    def partitions() -> Partitions:
        return Partitions(lambda name: _load(source, prefix + name), names)

    def find(key: str) -> Flat | Tensor:
        kind, _, rest = key.partition("/")
        try:
            if kind == _WEIGHT:
                return partitions().weights[rest]
            entry, _, name = rest.partition("/")
            found: Flat | Tensor = partitions().states[name][entry]
        except KeyError:
            raise CheckpointCorruptError(
                f"{source.name!r} contradicts itself: DeepSpeed's files in it have no {key!r}. Use another checkpoint."
            ) from None
        return found

    made: dict[int, Tensor] = {}
    for key, stand_in in stand_ins.items():
        if stand_in.is_meta:
            made[id(stand_in)] = torch.empty(stand_in.shape, dtype=stand_in.dtype, device="meta")
            continue
        content = FlatContent(functools.partial(find, key), stand_in.shape, stand_in.dtype)
        made[id(stand_in)] = (
            StoredTensor(content)
            if stored_tensors() and stand_in.device.type == "cpu"
            else content.keep().to(stand_in.device)
        )
    return made


def _load(source: FolderSource, name: str) -> Any:
    path = source.path_of(name)
    checked = identity_of(os.stat(path)) if isinstance(source, LocalSource) else None
    return load_engine_file(path, checked)
