"""Objects of all ranks, brought to one rank or to all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from treadle_fabric import tensor_pickle
from treadle_fabric.coordination.on_rank_zero import Ranked
from treadle_fabric.coordination.rendezvous import new_group

__all__ = ["all_gather_objects", "gather_objects"]

T = TypeVar("T")
_LARGE = 64 * 1024  # bytes; to send a smaller tensor by itself takes longer than to send its bytes


def gather_objects(strategy: Ranked, obj: T, dst: int = 0) -> list[T] | None:
    """Bring the objects of all ranks to one of them; every rank calls this.

    No other rank holds more than its own object, and ``dst`` no more than what is returned: large tensors are sent one
    by one, straight into the memory in which they stay.

    Args:
        strategy: A strategy or a Fabric: whose ranks.
        obj: Whatever can be pickled; tensors on any device.
        dst: The rank that gets the objects.

    Returns:
        On ``dst`` the objects in the order of the ranks, those of the others with tensors on the CPU; elsewhere None.
    """
    if strategy.world_size == 1:
        return [obj]
    group, rank = _host_group(), strategy.global_rank
    if rank != dst:
        header, large = _taken_apart(obj)
        dist.gather_object(header, dst=dst, group=group)
        for storage in large:
            dist.send(_bytes_of(storage), dst, group)
        return None
    headers: list[Any] = [None] * strategy.world_size
    dist.gather_object(None, headers, dst=dst, group=group)
    arriving: list[Any] = []

    def receive(src: int, part: Tensor) -> None:
        arriving.append(dist.irecv(part, src, group))  # from all ranks at the same time

    found = [
        obj if src == dst else _put_together(header, functools.partial(receive, src))
        for src, header in enumerate(headers)
    ]
    for work in arriving:
        work.wait()
    return found


def all_gather_objects(strategy: Ranked, obj: T) -> list[T]:
    """Bring the objects of all ranks to every rank; every rank calls this.

    It takes one message from each rank, and one more for each tensor that is large.

    Args:
        strategy: A strategy or a Fabric: whose ranks.
        obj: Whatever can be pickled; tensors on any device.

    Returns:
        The objects in the order of the ranks; those of the other ranks have their tensors on the CPU.
    """
    if strategy.world_size == 1:
        return [obj]
    group, rank = _host_group(), strategy.global_rank
    header, large = _taken_apart(obj)
    headers: list[Any] = [None] * strategy.world_size
    dist.all_gather_object(headers, header, group=group)
    found: list[T] = []
    for src, theirs in enumerate(headers):
        if src == rank:
            for storage in large:
                dist.broadcast(_bytes_of(storage), src, group)
            found.append(obj)
        else:
            found.append(_put_together(theirs, functools.partial(dist.broadcast, src=src, group=group)))
    return found


# --- how an object is sent ---

_Header = tuple[bytes, list[int], Tensor]
"""The object without its tensors, the size of each storage, and the bytes of all small storages."""


def _taken_apart(obj: Any) -> tuple[_Header, list[torch.UntypedStorage]]:
    """What travels in one message, and the large storages that travel after it."""
    stream, storages = tensor_pickle.dump(obj)
    small = [_bytes_of(s) for s in storages if s.nbytes() < _LARGE]
    together = torch.cat(small) if small else torch.empty(0, dtype=torch.uint8, device="cpu")
    return (stream, [s.nbytes() for s in storages], together), [s for s in storages if s.nbytes() >= _LARGE]


def _put_together(header: _Header, receive: Callable[[Tensor], Any]) -> Any:
    stream, sizes, small = header
    parts = iter(torch.split(small, [size for size in sizes if size < _LARGE]))
    storages = []
    for size in sizes:
        if size < _LARGE:
            part = next(parts).clone()
        else:
            receive(part := torch.empty(size, dtype=torch.uint8, device="cpu"))
        storages.append(part.untyped_storage())
    return tensor_pickle.load(stream, storages)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    on_host: torch.UntypedStorage = storage.cpu()  # type: ignore[no-untyped-call]  # itself, if it is there already
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(on_host)


_host_groups: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""For a default group that reaches devices only, a group of the same ranks that reaches host memory."""


def _host_group() -> Any:
    default = dist.group.WORLD
    if "cpu:" in dist.get_backend_config(default):
        return default
    if default not in _host_groups:
        _host_groups[default] = new_group(backend="gloo")
    return _host_groups[default]
