"""Move batches to a device, change their tensors, find their size."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from treadle_fabric.containers import children, map_leaves
from treadle_fabric.errors import MisconfigurationException

__all__ = [
    "batch_mover",
    "convert_tensors_to_scalars",
    "convert_to_tensors",
    "infer_batch_size",
    "map_tensors",
    "move_data_to_device",
]

_COPIED_AT_ONCE = frozenset({"cpu", "mps"})
"""Types of devices to which no copy is queued: the host may read, or change, what is copied too early."""


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

    if device.type == "xla":
        return _between_steps(move)
    return stay if device.type == "cpu" else move


def _between_steps(move: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The mover for a device of XLA, which runs what was recorded until the next batch is drawn."""
    import torch_xla  # an extra

    def cut(batch: Any) -> Any:
        torch_xla.sync()
        return move(batch)

    return cut


def _move(data: Any, device: torch.device) -> Any:
    if isinstance(data, Tensor):
        if data.device == device:
            return data
        # From pinned memory the copy runs beside the computation; to the CPU the host would read too early
        return data.to(device, non_blocking=device.type not in _COPIED_AT_ONCE)
    if device.type not in _COPIED_AT_ONCE and _takes_non_blocking(type(data)):  # type: ignore[arg-type] # classes are hashable
        moved = data.to(device, non_blocking=True)
    else:
        moved = data.to(device)
    return data if moved is None else moved


@functools.lru_cache(1024)
def _takes_non_blocking(kind: type) -> bool:
    """Whether ``to`` of a type takes ``non_blocking``: by name, or among any arguments at all, which it passes on."""
    try:
        parameters = inspect.signature(kind.to).parameters  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):  # an attribute of the object, or not written in Python
        return False
    named = parameters.get("non_blocking")
    if named is not None:
        return named.kind is not inspect.Parameter.POSITIONAL_ONLY
    return {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= {p.kind for p in parameters.values()}


def map_tensors(
    data: Any,
    function: Callable[[Any], Any],
    *,
    leaf: type | tuple[type, ...] = Tensor,
    movable: bool = False,
) -> Any:
    """Apply a function to every tensor in nested containers.

    Args:
        data: A tensor, or containers of some, of any type in :mod:`treadle_fabric.containers`.
        function: Gets a tensor, gives what takes its place.
        leaf: The types to apply the function to.
        movable: Also apply it to other objects that have a ``to`` method.

    Returns:
        The same structure; a container in which nothing changed is the same object.

    Raises:
        MisconfigurationException: The type of a container is one that cannot be made anew.
    """
    if movable:
        return map_leaves(data, function, lambda x: isinstance(x, leaf) or _has_to(x))
    return map_leaves(data, function, lambda x: isinstance(x, leaf))


def _has_to(value: Any) -> bool:
    return callable(getattr(value, "to", None)) and not isinstance(value, type)


_NO_SIZE = frozenset({str, bytes, int, float, bool, complex, type(None)})


def infer_batch_size(batch: Any) -> int | None:
    """The number of samples in a batch.

    Args:
        batch: A tensor or array, containers, or objects that keep some in public attributes or entries.

    Returns:
        What is found first: the number of sequences of a ``PackedSequence``; the number that an object gives as
        ``batch_size`` or ``num_graphs`` (a batch of graphs has no dimension of that size); the first dimension of a
        tensor or array. 1 where there are only scalars, ``None`` where there is none of these.
    """
    if isinstance(batch, Tensor):
        return int(batch.size(0)) if batch.dim() else 1  # a nested tensor has no shape
    stack = [batch]
    seen: dict[int, Any] = {}
    scalar = None  # 1 once there was a scalar, which tells less than a tensor that comes after it
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            if item.dim():
                return int(item.size(0))
            scalar = 1
            continue
        kind = type(item)
        if kind in _NO_SIZE or id(item) in seen:
            continue
        seen[id(item)] = item  # an object may hold one that holds the first
        if kind is tuple or kind is list:
            stack += item[::-1]
        elif kind is dict:
            stack += [*item.values()][::-1]
        elif not isinstance(item, type):
            held = children(item)
            size = _own_size(item, container=held is not None)
            if size is not None:
                return size
            if _is_array(item) and getattr(item, "shape", None) == ():
                scalar = 1
                continue
            stack += ([value for _, value in held] if held is not None else _public(item))[::-1]
    return scalar


def _own_size(item: Any, *, container: bool) -> int | None:
    """The number of samples as an object itself says it, without a look at what a container holds."""
    if isinstance(item, PackedSequence):
        return int(item.batch_sizes[0])
    shape = getattr(item, "shape", None)  # of a container, "shape" may be just a field
    if isinstance(shape, tuple if not container and _is_array(item) else torch.Size) and (shape or not container):
        return int(shape[0]) if shape else None
    for name in ("batch_size", "num_graphs"):
        size = getattr(item, name, None)
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    return None


def _is_array(item: Any) -> bool:
    return hasattr(item, "dtype") or hasattr(item, "__array__")


def _public(item: Any) -> list[Any]:
    """The entries of an object with keys, such as a graph, otherwise its public attributes."""
    keys = getattr(item, "keys", None)
    if callable(keys) and hasattr(type(item), "__getitem__"):
        return [item[key] for key in keys()]
    return [value for name, value in getattr(item, "__dict__", {}).items() if not name.startswith("_")]


def convert_to_tensors(data: Any, device: torch.device | str | int) -> Any:
    """Make tensors of the numbers and arrays in nested containers, and move all tensors to a device.

    Args:
        data: Numbers, truth values, NumPy arrays and tensors, in containers. Anything else is left as it is.
        device: The device of the tensors.
    """
    dtypes = ((bool, torch.uint8), (int, torch.int), (float, torch.float))
    for kind, dtype in dtypes:  # bool first, which is an int

        def made(value: Any, kind: type = kind, dtype: torch.dtype = dtype) -> Any:
            return torch.tensor(value, dtype=dtype, device=device) if type(value) is kind else value

        data = map_tensors(data, made, leaf=kind)
    arrays = map_tensors(data, torch.from_numpy, leaf=_arrays())
    return move_data_to_device(arrays, device)


def _arrays() -> Any:
    from numpy import ndarray  # torch has not imported NumPy

    return ndarray


def convert_tensors_to_scalars(data: Any) -> Any:
    """Make Python numbers of the tensors with one element in nested containers.

    Raises:
        MisconfigurationException: A tensor has another number of elements.
    """

    def number(tensor: Tensor) -> Any:
        if tensor.numel() != 1:
            raise MisconfigurationException(
                f"A tensor of shape {tuple(tensor.shape)} does not contain a single element, so it is no number: reduce"
                " the tensor, with `.mean()` say."
            )
        return tensor.item()

    return map_tensors(data, number)
