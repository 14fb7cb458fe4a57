"""Where the pieces of each tensor lie in the partitions of ZeRO, and the tensor put together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treadle_fabric.checkpoint.zero.files import model_files, optimizer_files
from treadle_fabric.errors import CheckpointCorruptError, CheckpointError

__all__ = ["Flat", "FlatContent", "Partitions"]

_OLD_PREFIX = "_forward_module."
"""What Lightning puts before the names of a module that it wrapped."""


class Flat(NamedTuple):
    """A tensor that lies in pieces, each of one dimension."""

    shape: tuple[int, ...]
    pieces: tuple[Tensor, ...]
    """In order; what is behind the last element is padding."""

    @property
    def dtype(self) -> torch.dtype:
        """That of its pieces."""
        return self.pieces[0].dtype if self.pieces else torch.float32

    def whole(self) -> Tensor:
        """The tensor, in memory of its own."""
        found = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        at, target = 0, found.view(-1)
        for piece in self.pieces:
            count = min(piece.numel(), target.numel() - at)
            target[at : at + count].copy_(piece[:count])
            at += count
        if at != target.numel():
            raise CheckpointCorruptError(
                f"The partitions have {at} of the {target.numel()} elements of a tensor. A file of another checkpoint "
                "lies in the folder; use another checkpoint."
            )
        return found


class FlatContent:
    """The content of a tensor in the partitions of ZeRO, as :class:`Content` is that of one in a folder of Treadle's.

    Args:
        flat: Finds it, when it is asked for.
        shape: Its shape.
        dtype: Its dtype.
    """

    def __init__(self, flat: Callable[[], Flat | Tensor], shape: Sequence[int], dtype: torch.dtype) -> None:
        self._flat = flat
        self.entry: Mapping[str, Any] = {"shape": list(shape)}
        self.dtype = dtype
        self.kept: Tensor | None = None

    def fill(self, target: Tensor, offsets: Sequence[int]) -> None:
        """Copy the part that begins at ``offsets`` and has the shape of ``target``."""
        whole = self._whole() if self.kept is None else self.kept
        target.copy_(whole[tuple(slice(o, o + s) for o, s in zip(offsets, target.shape, strict=True))])

    def keep(self) -> Tensor:
        """The whole content, which stays in memory."""
        if self.kept is None:
            self.kept = self._whole()
        return self.kept

    def _whole(self) -> Tensor:
        flat = self._flat()
        found = flat.whole() if isinstance(flat, Flat) else flat
        if list(found.shape) != self.entry["shape"]:
            raise CheckpointCorruptError(
                f"A tensor has the shape {list(found.shape)} in DeepSpeed's files, and {self.entry['shape']} beside "
                "them: the files are of another checkpoint. Use another one."
            )
        return found if found.dtype == self.dtype else found.to(self.dtype)


class Group(NamedTuple):
    """A parameter group of the optimizer."""

    options: dict[str, Any]
    names: list[str]


class Partitions:
    """The weights and optimizer states in DeepSpeed's files, by the names of the parameters.

    Args:
        load: Reads a file, given its name.
        names: All files.

    Raises:
        CheckpointError: Files are missing, or the model was cut into several parts.
    """

    def __init__(self, load: Callable[[str], Any], names: Iterable[str]) -> None:
        listed = list(names)
        self.models = [load(name) for name in model_files(listed)]
        if not self.models:
            raise CheckpointError("No file of a model of DeepSpeed is there. Copy the whole folder.")
        self.weights: dict[str, Flat | Tensor] = dict(self.models[0].get("module") or {})
        self.states: dict[str, dict[str, Any]] = {}
        self.groups: list[Group] = []
        found = [load(name)["optimizer_state_dict"] for name in optimizer_files(listed)]
        if found:
            count = found[0].get("partition_count")
            wanted = max(count) if isinstance(count, list) else count
            if wanted != len(found):
                raise CheckpointCorruptError(
                    f"{len(found)} of the {wanted} files of the optimizer are there. Copy the whole folder, or use "
                    "another checkpoint."
                )
            if found[0].get("zero_stage", 1) == 3:
                self._read_stage_3(found)
            else:
                self._read_stages_1_and_2(found)
        for alias, name in dict(self.models[0].get("shared_params") or {}).items():
            if name in self.weights:
                self.weights[alias] = self.weights[name]
        self._drop_prefix()

    def _read_stages_1_and_2(self, ranks: list[dict[str, Any]]) -> None:
        shapes = self.models[0]["param_shapes"]
        paddings = ranks[0].get("param_alignment_paddings")
        for g, group in enumerate(shapes):
            parts = [rank["single_partition_of_fp32_groups"][g] for rank in ranks]
            states = [_state_of_group(rank["base_optimizer_state"], g) for rank in ranks]
            at = 0
            for i, (name, shape) in enumerate(group.items()):
                end = at + math.prod(shape)
                self.weights[name] = _flat(parts, at, end, shape)
                self.states[name] = _states(states, parts, functools.partial(_flat, start=at, end=end, shape=shape))
                at = end + (paddings[g][i] if paddings else 0)
            self.groups.append(Group(_options(ranks[0]["base_optimizer_state"], g), list(group)))

    def _read_stage_3(self, ranks: list[dict[str, Any]]) -> None:
        at = 0  # in the sub-groups of a rank, one after the other
        subgroups = [rank["fp32_flat_groups"] for rank in ranks]
        states = [
            [_state_of_group(rank["optimizer_state_dict"], i) for i in range(len(subgroups[0]))] for rank in ranks
        ]
        for g, group in enumerate(self.models[0]["param_shapes"]):
            for name, shape in group.items():
                share = -(-math.prod(shape) // len(ranks))
                pieces = [piece for parts in subgroups for piece in _cut(parts, at, at + share)]
                self.weights[name] = Flat(tuple(shape), tuple(pieces))
                here = _subgroup_at(subgroups[0], at)
                self.states[name] = {
                    key: Flat(tuple(shape), tuple(_pieces_of_states(states, subgroups, key, at, at + share)))
                    if _is_flat(value, subgroups[0][here])
                    else value
                    for key, value in states[0][here].items()
                }
                at += share
            self.groups.append(Group(_options(ranks[0]["optimizer_state_dict"], g), list(group)))
        for name, shape in dict(self.models[0].get("frozen_param_shapes") or {}).items():
            pieces = [model["frozen_param_fragments"][name].view(-1) for model in self.models]
            self.weights[name] = Flat(tuple(shape), tuple(pieces))

    def _drop_prefix(self) -> None:
        if self.weights and all(name.startswith(_OLD_PREFIX) for name in self.weights):
            size = len(_OLD_PREFIX)
            self.weights = {name[size:]: value for name, value in self.weights.items()}
            self.states = {name[size:]: value for name, value in self.states.items()}
            self.groups = [Group(g.options, [name[size:] for name in g.names]) for g in self.groups]


def _flat(parts: Sequence[Tensor], start: int, end: int, shape: Sequence[int]) -> Flat:
    return Flat(tuple(shape), tuple(_cut(parts, start, end)))


def _cut(parts: Sequence[Tensor], start: int, end: int) -> Iterator[Tensor]:
    """The pieces of tensors that lie one after the other from ``start`` to ``end``."""
    at = 0
    for part in parts:
        begin, stop = max(start - at, 0), min(end - at, part.numel())
        if begin < stop:
            yield part.view(-1)[begin:stop]
        at += part.numel()


def _subgroup_at(parts: Sequence[Tensor], position: int) -> int:
    at = 0
    for i, part in enumerate(parts):
        at += part.numel()
        if position < at:
            return i
    return max(len(parts) - 1, 0)


def _pieces_of_states(
    states: list[list[dict[str, Any]]], subgroups: list[list[Tensor]], key: str, start: int, end: int
) -> Iterator[Tensor]:
    for of_rank, parts in zip(states, subgroups, strict=True):
        at = 0
        for state, part in zip(of_rank, parts, strict=True):
            begin, stop = max(start - at, 0), min(end - at, part.numel())
            if begin < stop:
                yield state[key].view(-1)[begin:stop]
            at += part.numel()


def _states(
    states: list[dict[str, Any]], parts: Sequence[Tensor], flat: Callable[[list[Tensor]], Flat]
) -> dict[str, Any]:
    """The states of one parameter: what lies as the partitions do in pieces, and everything else as it is."""
    return {
        key: flat([state[key] for state in states]) if _is_flat(value, parts[0]) else value
        for key, value in states[0].items()
    }


def _is_flat(value: Any, part: Tensor) -> bool:
    """Whether a state lies as a partition does; that of the last rank may have padding, which the partition lacks."""
    return isinstance(value, Tensor) and value.dim() == 1 and value.numel() >= part.numel() > 0


def _state_of_group(base: Any, group: int) -> dict[str, Any]:
    if isinstance(base, list):  # of an elastic checkpoint
        return dict(base[group]) if group < len(base) else {}
    return dict(base.get("state", {}).get(group, {}))


def _options(base: Any, group: int) -> dict[str, Any]:
    groups = base.get("param_groups", []) if isinstance(base, dict) else []
    return {key: value for key, value in groups[group].items() if key != "params"} if group < len(groups) else {}
