"""The pieces of tensors that a rank writes: what it holds, but of a piece that several ranks hold one writes it."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Piece", "on_host", "pieces_held"]


class Piece(NamedTuple):
    """A box of a tensor, and the numbers in it."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    values: Tensor

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Piece:
        """A tensor that is one piece."""
        return cls(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor.detach())


def pieces_held(tensors: Mapping[str, Any]) -> list[Piece]:
    """The pieces of DTensors and ShardedTensors that this rank is to write.

    Of a piece that several ranks hold, one of them writes it: the one with the fewest bytes so far. All of these ranks
    hold the same pieces, of tensors in the same order, so that each finds the same without a word to the others.

    Args:
        tensors: By name; on every rank in the same order.
    """
    loads: dict[Any, list[int]] = {}
    held: list[Piece] = []
    for name, tensor in tensors.items():
        for piece, place, copies, which in _pieces_of(name, tensor):
            load = loads.setdefault(which, [0] * copies)
            writer = load.index(min(load))
            load[writer] += piece.values.nbytes
            if writer == place and (piece.values.numel() or not math.prod(piece.shape)):
                held.append(piece)
    return held


def _pieces_of(name: str, tensor: Any) -> Iterator[tuple[Piece, int, int, Any]]:
    """Each piece of a tensor here, which of its copies this is, how many there are, and what stands for their ranks."""
    shape = tuple(tensor.shape)
    if hasattr(tensor, "local_shards"):  # a ShardedTensor
        for shard in tensor.local_shards():
            yield Piece(name, shape, tuple(shard.metadata.shard_offsets), shard.tensor.detach()), 0, 1, None
        return
    mesh = tensor.device_mesh
    here = mesh.get_coordinate()
    if here is None:  # other ranks have it
        return
    place, copies = 0, 1
    replicated = tuple(dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate())
    for at, size in (*((here[dim], mesh.size(dim)) for dim in replicated), *_beside(mesh)):
        place, copies = place * size + at, copies * size
    local = tensor.to_local().detach()
    for chunk in tensor.__create_chunk_list__():
        yield Piece(name, shape, tuple(chunk.offsets), local), place, copies, (mesh, replicated)


@functools.lru_cache(maxsize=32)
def _beside(mesh: Any) -> list[tuple[int, int]]:
    """Where this rank is along the dimensions that the whole mesh has and this part of it has not, and their sizes.

    Ranks along these hold the same, but for those of a pipeline, where each has its own part of the model.
    """
    if hasattr(mesh, "_get_root_mesh"):
        root = mesh._get_root_mesh()
    else:  # earlier torch
        root = sys.modules[type(mesh).__module__]._mesh_resources.get_root_mesh(mesh)
    names, whole = root.mesh_dim_names, root.mesh
    if root is mesh or names is None:
        return []
    places = [(whole == rank).nonzero()[0].tolist() for rank in mesh.mesh.flatten().tolist()]
    return [
        (places[0][dim], whole.shape[dim])
        for dim, name in enumerate(names)
        if whole.shape[dim] > 1 and name != "pipeline_parallel" and len({place[dim] for place in places}) == 1
    ]


def on_host(values: Tensor) -> Tensor:
    """The numbers on the CPU, with no others in their memory, which would be written, too."""
    found = values.cpu()
    if found.untyped_storage().nbytes() != found.nbytes or not _is_plain(found):
        found = found.clone(memory_format=torch.contiguous_format)
    return found


def _is_plain(values: Tensor) -> bool:
    return not values.is_conj() and not values.is_neg()
