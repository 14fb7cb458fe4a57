"""Move batches to a device, change their tensors, find their size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from treadle_fabric.containers import SEQUENCES, children, map_leaves

__all__ = ["batch_mover", "infer_batch_size", "map_tensors", "move_data_to_device"]


def move_data_to_device(batch: Any, device: torch.device | str | int) -> Any:
    """Move a batch to a device.

    Args:
        batch: A tensor, an object with ``.to(device)``, or containers of some; everything else is left as it is.
        device: The device to move to.

    Returns:
        The moved batch; the same object when everything is on the device already.
    """
    if not isinstance(device, torch.device):
        device = torch.device(device)
    kind = type(batch)
    if kind is Tensor:
        return batch if batch.device == device else _move(batch, device)
    # Batches that are on the device already cost no more than this look
    if kind is list or kind is tuple:
        for item in batch:
            if type(item) is not Tensor or item.device != device:
                break
        else:
            return batch
    elif kind is dict:
        for item in batch.values():
            if type(item) is not Tensor or item.device != device:
                break
        else:
            return batch
    return map_tensors(batch, partial(_move, device=device), movable=True)


def batch_mover(device: torch.device) -> Callable[[Any], Any]:
    """:func:`move_data_to_device` for one device, quicker for batches that are on the CPU and stay there."""

    def move(batch: Any) -> Any:
        return move_data_to_device(batch, device)

    def stay(batch: Any) -> Any:
        kind = type(batch)
        if kind is list or kind is tuple:
            for item in batch:
                if type(item) is not Tensor or not item.is_cpu:
                    return move_data_to_device(batch, device)
            return batch
        return move_data_to_device(batch, device)

    return stay if device.type == "cpu" else move


def _move(data: Any, device: torch.device) -> Any:
    if isinstance(data, Tensor):
        if data.device == device:
            return data
        # From pinned memory the copy runs beside the computation; out of CUDA the host would read too early
        return data.to(device, non_blocking=device.type == "cuda")
    moved = data.to(device)
    return data if moved is None else moved


def map_tensors(
    data: Any,
    function: Callable[[Any], Any],
    *,
    leaf: type | tuple[type, ...] = Tensor,
    movable: bool = False,
) -> Any:
    """Apply a function to every tensor in nested containers.

    Args:
        data: A tensor, or containers of some: lists, tuples, deques, mappings, dataclasses.
        function: Gets a tensor, gives what takes its place.
        leaf: The types to apply the function to.
        movable: Also apply it to other objects that have a ``to`` method.

    Returns:
        The same structure; a container in which nothing changed is the same object.
    """
    if movable:
        return map_leaves(data, function, lambda x: isinstance(x, leaf) or callable(getattr(x, "to", None)))
    return map_leaves(data, function, lambda x: isinstance(x, leaf))


def infer_batch_size(batch: Any) -> int | None:
    """The number of samples in a batch.

    Args:
        batch: A tensor or array, containers, or objects that keep some in public attributes.

    Returns:
        The number of sequences of the first ``PackedSequence``, or the first dimension of the first tensor or array,
        whichever is found first; 1 for a scalar; ``None`` where there is none.
    """
    stack = [batch]
    while stack:
        item = stack.pop()
        shape = getattr(item, "shape", None)
        if isinstance(shape, tuple):  # a tensor's is one
            return int(shape[0]) if shape else 1
        if isinstance(item, PackedSequence):
            return int(item.batch_sizes[0])
        if isinstance(item, Mapping):
            stack += reversed(list(item.values()))
        elif isinstance(item, SEQUENCES):
            stack += reversed(item)
        else:
            named = {**getattr(item, "__dict__", {}), **dict(children(item) or ())}  # slots are in no __dict__
            stack += [value for name, value in named.items() if not name.startswith("_")][::-1]
    return None
