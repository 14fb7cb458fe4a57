"""Fill tensors with what a rank needs of a stored, a mapped or any other tensor, without communication."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from treadle_fabric.checkpoint.distributed.split import is_sharded_tensor, own_part
from treadle_fabric.checkpoint.stored.tensor import StoredTensor
from treadle_fabric.errors import CheckpointMismatchError

__all__ = ["fill", "placed_like", "region"]

Runs = list[tuple[int, int]]
"""Begin and end of ranges of indices along one dimension."""


def region(source: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A part of a tensor. Of a stored tensor no more than that is read, into new memory; of another it is a view.

    Args:
        source: Stored, mapped from a file or in memory, and no DTensor.
        offsets: Where the part begins in each dimension.
        sizes: Its shape.
    """
    if isinstance(source, StoredTensor):
        found = torch.empty(tuple(sizes), dtype=source.dtype, device="cpu")
        source._content.fill(found, offsets)
        return found
    return source.detach()[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]


def fill(target: Tensor, source: Tensor) -> None:
    """Copy ``source`` into ``target``; of a DTensor into the part that this rank holds. Nothing is sent between ranks.

    Of a stored tensor only that part is read, in pieces of a few MB.

    Args:
        target: A tensor, a parameter or a DTensor, of any dtype, on any device but meta.
        source: The whole of it, of the same shape: stored, mapped from a file or in memory. Or a DTensor that is laid
            out as ``target`` is.

    Raises:
        CheckpointMismatchError: The shapes differ, or the layouts of two DTensors.
        CheckpointError: A stored tensor cannot be read.
    """
    if source.shape != target.shape:
        raise CheckpointMismatchError(
            f"A tensor of the shape {list(source.shape)} does not fit one of the shape {list(target.shape)}. Make the "
            "model as it was when the checkpoint was written."
        )
    with torch.no_grad():
        if is_sharded_tensor(source):
            own_part(target).copy_(_local_like(source, target))
        elif is_sharded_tensor(target):
            _fill_local(own_part(target), source, target)
        elif isinstance(source, StoredTensor):
            source._content.fill(target.detach(), [0] * target.dim())
        else:
            target.copy_(source)


def placed_like(source: Tensor, target: Tensor) -> Tensor:
    """``source`` on the device of ``target``, and sharded as ``target`` is; nothing is sent between ranks.

    Args:
        source: Whole on every rank, or sharded already.
        target: A tensor or a DTensor of the same shape.
    """
    if not is_sharded_tensor(target):
        return _moved(source, target.device)
    if is_sharded_tensor(source):
        return source.to(target.device)
    made: Any = target
    local = torch.empty_like(own_part(target), dtype=source.dtype)
    _fill_local(local, source, target)
    found: Tensor = type(made).from_local(
        local, made.device_mesh, made.placements, run_check=False, shape=made.shape, stride=made.stride()
    )
    return found


def _moved(source: Tensor, device: torch.device) -> Tensor:
    if isinstance(source, StoredTensor):
        found = torch.empty(source.shape, dtype=source.dtype, device=device)
        source._content.fill(found, [0] * found.dim())
        return found
    return source.to(device)


def _local_like(source: Any, target: Any) -> Tensor:
    if not is_sharded_tensor(target) or source.placements != target.placements:
        laid_out = target.placements if is_sharded_tensor(target) else "one piece"
        raise CheckpointMismatchError(
            f"A DTensor in {source.placements} cannot fill a tensor in {laid_out} without communication. Redistribute "
            "it before, or load from a checkpoint that is on the disk."
        )
    return own_part(source)


def _fill_local(local: Tensor, source: Tensor, target: Any) -> None:
    """Fill ``local`` as the part of ``target`` that this rank holds: a grid of boxes of the whole."""
    runs = _runs_of(target)
    if runs is None:
        return
    sizes = [sum(end - begin for begin, end in of_dim) for of_dim in runs]
    if sizes != list(local.shape):
        raise CheckpointMismatchError(
            f"This rank holds {list(local.shape)} of a tensor of the shape {list(source.shape)}, and its placements say"
            f" {sizes}. Shard dimensions that the mesh divides."
        )
    if not local.numel():
        return
    for box in itertools.product(*(_placed(of_dim) for of_dim in runs)):
        into = local[tuple(slice(at, at + end - begin) for at, begin, end in box)]
        if isinstance(source, StoredTensor):
            source._content.fill(into, [begin for _, begin, _ in box])
        else:
            into.copy_(source[tuple(slice(begin, end) for _, begin, end in box)])


def _placed(runs: Runs) -> list[tuple[int, int, int]]:
    """Of each range where it lies in the rank's part, and begin and end in the whole."""
    ends = itertools.accumulate((end - begin for begin, end in runs), initial=0)
    return [(at, begin, end) for at, (begin, end) in zip(ends, runs, strict=False)]


def _runs_of(target: Any) -> list[Runs] | None:
    """Which indices of each dimension this rank holds of a DTensor; None: it is no rank of the mesh."""
    coordinate = target.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    runs: list[Runs] = [[(0, size)] for size in target.shape]
    for mesh_dim, placement in enumerate(target.placements):
        parts, place = target.device_mesh.size(mesh_dim), coordinate[mesh_dim]
        if placement.is_partial():
            raise CheckpointMismatchError(f"A tensor in {target.placements} holds summands, which cannot be filled.")
        if placement.is_replicate():
            continue
        dim = placement.dim
        # the split factor of FSDP over tensor parallelism: the tensor is cut into so many pieces first
        pieces = _cut(runs[dim], getattr(placement, "split_factor", 1))
        runs[dim] = [run for piece in pieces for run in _cut(piece, parts)[place]]
    return runs


def _cut(runs: Runs, parts: int) -> list[Runs]:
    """Cut ranges into parts as :func:`torch.chunk` does; the last ones may be empty."""
    length = sum(end - begin for begin, end in runs)
    each = -(-length // parts)
    found: list[Runs] = []
    for part in range(parts):
        first, last = min(length, part * each), min(length, (part + 1) * each)
        found.append(
            [
                (begin + max(first - at, 0), begin + min(last - at, end - begin))
                for at, begin, end in _placed(runs)
                if max(first, at) < min(last, at + end - begin)
            ]
        )
    return found
