"""Batches: move them to a device, change their tensors, find their size."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["batch_mover", "infer_batch_size", "map_tensors", "move_data_to_device"]


def move_data_to_device(batch: Any, device: torch.device | str | int) -> Any:
    """Move a batch to a device.

    Args:
        batch: A tensor, an object with ``.to(device)``, or lists, tuples, mappings and dataclasses that hold some;
            everything else is left as it is.
        device: Where to.

    Returns:
        The moved batch; the same object when everything is there already.
    """
    if not isinstance(device, torch.device):
        device = torch.device(device)
    kind = type(batch)
    if kind is Tensor:
        return batch if batch.device == device else _move(batch, device)
    # Batches that are already there cost no more than this look
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
        data: A tensor, or lists, tuples, mappings and dataclasses that hold some.
        function: Gets a tensor, gives what takes its place.
        leaf: The types it applies to.
        movable: Also apply it to other objects that have a ``to`` method.

    Returns:
        The same structure; a container in which nothing changed is the same object.
    """
    if isinstance(data, leaf) or (movable and callable(getattr(data, "to", None))):
        return function(data)
    if isinstance(data, (list, tuple)):
        items = [map_tensors(x, function, leaf=leaf, movable=movable) for x in data]
        if all(new is old for new, old in zip(items, data, strict=True)):
            return data
        return _rebuild_sequence(data, items)
    if isinstance(data, Mapping):
        changed = {}
        for key, value in data.items():
            new = map_tensors(value, function, leaf=leaf, movable=movable)
            if new is not value:
                changed[key] = new
        return _rebuild_mapping(data, changed) if changed else data
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        changed = {}
        for field in dataclasses.fields(data):
            value = getattr(data, field.name, None)
            new = map_tensors(value, function, leaf=leaf, movable=movable)
            if new is not value:
                changed[field.name] = new
        if not changed:
            return data
        result = copy.copy(data)
        for name, value in changed.items():
            object.__setattr__(result, name, value)  # frozen ones too
        return result
    return data


def _rebuild_sequence(data: Any, items: list[Any]) -> Any:
    kind = type(data)
    if kind is list:
        return items
    if isinstance(data, list):
        result = copy.copy(data)
        result[:] = items
        return result
    return kind(*items) if hasattr(data, "_fields") else kind(items)


def _rebuild_mapping(data: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    if type(data) is dict:
        return {**data, **changed}
    if isinstance(data, MutableMapping):
        result = copy.copy(data)
        for key, value in changed.items():
            result[key] = value
        return result
    return type(data)({**data, **changed})  # type: ignore[call-arg]


def infer_batch_size(batch: Any) -> int | None:
    """The first dimension of the first tensor or array found in a batch; None where there is none."""
    stack = [batch]
    while stack:
        item = stack.pop()
        shape = getattr(item, "shape", None)
        if isinstance(shape, tuple):  # a tensor's is one
            return int(shape[0]) if shape else 1
        if isinstance(item, str):
            continue
        if isinstance(item, Mapping):
            stack += reversed(list(item.values()))
        elif isinstance(item, (list, tuple)):
            stack += reversed(item)
        elif hasattr(item, "__dict__"):
            stack += reversed([v for k, v in vars(item).items() if not k.startswith("_")])
    return None
