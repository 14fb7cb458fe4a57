"""The weights in a checkpoint: which entry they are, under which names, and in which files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from treadle_fabric.checkpoint.export.safetensors_file import bytes_of
from treadle_fabric.checkpoint.stored.tensor import StoredTensor
from treadle_fabric.checkpoint.values.packing import OWN_KEY
from treadle_fabric.errors import CheckpointError, near_names

__all__ = ["Weights", "in_files", "weights_in"]
_OF_TRAINER: Final = "state_dict"


class Weights(NamedTuple):
    """The weights of a model."""

    tensors: dict[str, Tensor]
    """Each once, by name."""
    metadata: dict[str, str]
    """The format, and for each further name of a tied tensor the one that it has in ``tensors``."""
    left_out: list[str]
    """The names of what is no tensor."""


def weights_in(content: Mapping[str, Any], name: str, key: str | None = None, strip_prefix: str = "") -> Weights:
    """Find the weights in a checkpoint.

    Args:
        content: What it holds.
        name: What the user calls it.
        key: The entry with the weights. Default: ``state_dict``, where a Trainer has them, or else the only entry that
            holds tensors by name.
        strip_prefix: What names lose where they begin with it.

    Raises:
        CheckpointError: There is no such entry, or several entries could be meant; or names collide.
    """
    found = _entry(content, name, key)
    tensors: dict[str, Tensor] = {}
    names: dict[Any, list[str]] = {}
    for each, value in found.items():
        if isinstance(value, Tensor):
            short = each.removeprefix(strip_prefix)
            if short in tensors:
                raise CheckpointError(
                    f"Without the prefix {strip_prefix!r} two tensors of {name!r} are called {short!r}. Choose another "
                    "prefix."
                )
            tensors[short] = value.detach() if not isinstance(value, StoredTensor) else value
            names.setdefault(_identity(value), []).append(short)
    metadata = {"format": "pt"}
    for same in names.values():
        kept = min(same)
        for other in same:
            if other != kept:
                metadata[other] = kept
                del tensors[other]
    return Weights(tensors, metadata, [each for each, value in found.items() if not isinstance(value, Tensor)])


def in_files(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, most: int, files: int
) -> list[dict[str, Tensor]]:
    """Share tensors out to files of about the same size, in their order.

    Args:
        tensors: By name.
        dtype: As for :func:`write_safetensors`.
        most: Bytes of a file at most; a larger tensor has a file of its own.
        files: The number of files that is wanted, where the tensors allow it.
    """
    total = sum(bytes_of(tensor, dtype) for tensor in tensors.values())
    most = min(most, max(1, -(-total // max(1, files))))
    found: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        nbytes = bytes_of(tensor, dtype)
        if found[-1] and size + nbytes > most:
            found.append({})
            size = 0
        found[-1][name] = tensor
        size += nbytes
    return found


def _entry(content: Mapping[str, Any], name: str, key: str | None) -> Mapping[str, Any]:
    candidates = [each for each, value in content.items() if each != OWN_KEY and _are_weights(value)]
    listed = ", ".join(map(repr, candidates))
    if key is not None:
        value: Any = content
        for step in [key] if key in content else key.split("."):
            if not isinstance(value, Mapping) or step not in value:
                known: Sequence[Any] = list(value) if isinstance(value, Mapping) else []
                raise CheckpointError(f"{name!r} has no entry {key!r}. {near_names(step, known)}")
            value = value[step]
        if not _are_weights(value):
            raise CheckpointError(
                f"The entry {key!r} of {name!r} does not hold tensors by name. These do: {listed or 'none'}."
            )
        found: Mapping[str, Any] = value
        return found
    if _are_weights(content):
        return content
    if _OF_TRAINER in candidates:
        candidates = [_OF_TRAINER]
    if len(candidates) != 1:
        problem = f"several entries that could be the weights: {listed}" if candidates else "no entry that is weights"
        remedy = "Name the one that is meant with `key`." if candidates else f"It has: {', '.join(map(repr, content))}."
        raise CheckpointError(f"{name!r} has {problem}. {remedy}")
    chosen: Mapping[str, Any] = content[candidates[0]]
    return chosen


def _are_weights(value: Any) -> bool:
    """Whether this is like the state dict of a module, which may have other values among its tensors."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(each, Tensor) for each in value.values())
        and not any(isinstance(each, Mapping) and key != "_extra_state" for key, each in value.items())
        and not {"state", "param_groups"} <= value.keys()
    )


def _identity(tensor: Tensor) -> Any:
    """The same for tensors that are one."""
    if isinstance(tensor, StoredTensor):
        return id(tensor._content)
    if not tensor.numel() or tensor.is_meta or tensor.layout != torch.strided:
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device
