"""Split a state: large tensors by name, and the structure with stand-ins for them.

Large tensors are written as torch.distributed.checkpoint writes them, one file a process. Tensors that every rank has
alike are shared out between the ranks; of a DTensor or ShardedTensor each rank writes what it holds. What a rank has
of its own (``PerRank``) goes into a file of its own, ``rank_0.pt`` and so on. Everything else, and the structure, is
rank 0's and goes into ``meta.pt``, with a tensor of one stored value in the place of each large tensor and an empty one
in the place of each ``PerRank``. The number of processes that read is free.

A tensor on the meta device is one that this rank has not, and another one may have, under the same name: as in a
pipeline, where each rank has some layers. Then the rank that has it writes it, however small it is.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from treadle_fabric.checkpoint.per_rank import PerRank
from treadle_fabric.checkpoint.values.kept import KeptTensor

__all__ = []
_LARGE = 32 * 1024  # bytes; to write a smaller tensor by itself takes longer than to write its bytes


# --- which values go to a file of their own ---


class Split:
    """A state that is split: by name large tensors and what a rank has of its own, and the structure with stand-ins."""

    def __init__(self, state: Any) -> None:
        self.elsewhere: dict[str, Tensor] = {}
        """The tensors that are on the meta device here."""
        self.tensors: dict[str, Tensor] = {}
        """All tensors, by their paths."""
        self.replicated: dict[str, Tensor] = {}
        self.sharded: dict[str, Any] = {}
        self.own: dict[str, Any] = {}
        self.writers: list[Any] = []
        """What writes the tensors that are kept in files of another library; on every rank the same."""
        self._kept: dict[str, Tensor] = {}
        self._own_stand_ins: dict[str, Tensor] = {}
        self._stand_ins: dict[str, Tensor] = {}
        self._known: dict[Any, Tensor] = {}
        self.structure = map_leaves(state, self._replace, "")

    def content(self) -> dict[str, Any]:
        """The content of ``meta.pt``. A stand-in and its name stay together, because each stand-in is one object."""
        kept = {"engine": self._kept} if self._kept else {}
        return {"state": self.structure, "tensors": self._stand_ins, "per_rank": self._own_stand_ins, **kept}

    def _replace(self, value: Any, name: str) -> Any:
        if isinstance(value, PerRank):
            while name in self.own:
                name += "'"
            self.own[name], self._own_stand_ins[name] = value.value, (stand_in := torch.empty(0, device="cpu"))
            return stand_in
        if isinstance(value, KeptTensor):
            return self._kept_elsewhere(value)
        if isinstance(value, Tensor):
            self.tensors[name] = value
        if type(value) in (Tensor, Parameter) and value.is_meta:
            return self._elsewhere(value, name)
        sharded = is_sharded_tensor(value)
        if not sharded and not _is_large(value):
            return value
        # tied weights are several tensors with the same memory
        memory = () if sharded else (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        key = id(value) if sharded else (type(value), *memory)
        if key in self._known:
            return self._known[key]
        while name in self._stand_ins:  # the keys "a.b" and "a", "b"
            name += "'"
        stand_in = torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape)
        if isinstance(value, Parameter):
            stand_in = Parameter(stand_in, requires_grad=value.requires_grad)
        self._known[key] = self._stand_ins[name] = stand_in
        (self.sharded if sharded else self.replicated)[name] = value
        return stand_in

    def _kept_elsewhere(self, value: KeptTensor) -> Tensor:
        """A stand-in for what an engine writes into files of its own."""
        if value.key not in self._kept:
            self._kept[value.key] = torch.zeros((), dtype=value.dtype, device="cpu").expand(value.shape)
            if not any(writer is value.writer for writer in self.writers):
                self.writers.append(value.writer)
        return self._kept[value.key]

    def _elsewhere(self, value: Tensor, name: str) -> Tensor:
        """A stand-in for what another rank may have."""
        stand_in = torch.zeros((), dtype=value.dtype, device="cpu").expand(value.shape)
        if isinstance(value, Parameter):
            stand_in = Parameter(stand_in, requires_grad=value.requires_grad)
        self.elsewhere[name], self._stand_ins[name] = value, stand_in
        return stand_in

    def nowhere(self, names: Collection[str]) -> None:
        """Put those tensors back into the structure that are on the meta device on all ranks."""
        back = {id(self._stand_ins.pop(name)): self.elsewhere[name] for name in names}
        if back:
            self.structure = map_leaves(self.structure, lambda value, _: back.get(id(value), value), "")


def _is_large(value: Any) -> bool:
    return (
        type(value) in (Tensor, Parameter)
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_meta
        and not value.is_conj()
        and not value.is_neg()
        and value.nbytes >= _LARGE
    )


def is_sharded_tensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor or a ShardedTensor, without importing the modules of these classes."""
    if type(value) is Tensor or type(value) is Parameter:
        return False
    homes = (("torch.distributed.tensor", "DTensor"), ("torch.distributed._shard.sharded_tensor", "ShardedTensor"))
    for home, name in homes:
        module = sys.modules.get(home)  # before that module is imported there is no such tensor
        if module is not None and isinstance(value, getattr(module, name)):
            return True
    return False


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, detached: a change of the part changes the tensor."""
    part: Any = tensor.detach()
    own: Tensor = part.to_local() if is_sharded_tensor(part) else part
    return own


def sharded_like(part: Tensor, tensor: Any) -> Tensor:
    """A tensor of which this rank has ``part``, sharded as ``tensor`` is; nothing is copied or sent.

    Args:
        part: Of the shape of ``own_part(tensor)``, of any dtype and on any device.
        tensor: Any tensor; of a plain one the part is the whole.
    """
    if not is_sharded_tensor(tensor):
        return part
    meta = tensor._spec.tensor_meta._replace(dtype=part.dtype)
    spec = dataclasses.replace(tensor._spec, tensor_meta=meta)
    made: Tensor = type(tensor)(part, spec, requires_grad=False)  # from_local would move it to the mesh's devices
    return made


def map_leaves(value: Any, change: Callable[[Any, str], Any], path: str) -> Any:
    """``value`` with every leaf changed, given its path; containers are copied, with what they have as attributes."""
    inner = f"{path}." if path else ""
    if isinstance(value, dict):
        new = copy.copy(value)
        for key, each in value.items():
            new[key] = map_leaves(each, change, f"{inner}{key}")
        if attributes := getattr(value, "__dict__", None):  # a state dict has the versions of its modules there
            vars(new).update(attributes)
        return new
    if type(value) in (list, tuple):
        return type(value)(map_leaves(each, change, f"{inner}{i}") for i, each in enumerate(value))
    return change(value, path)
