"""Objects of ranks, brought to one rank or to all of them: through host memory, and in pieces.

An object travels as a *parcel*: its body, which is the object without what is large in it, and the large parts, each
straight into the memory in which it stays. Nothing is pickled with its device: tensors are copied to the CPU first.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from treadle_fabric import tensor_pickle
from treadle_fabric.coordination.hosts import HostGroup, host_group
from treadle_fabric.coordination.on_rank_zero import Ranked
from treadle_fabric.errors import MisconfigurationException

__all__ = ["all_gather_objects", "broadcast_object", "gather_objects"]

T = TypeVar("T")
_LARGE = 64 * 1024  # bytes; to send a smaller tensor by itself takes longer than to send its bytes
_CHUNK = 128 * 1024 * 1024  # bytes of a message at most
_PACKET = 2048  # bytes of the first message, into which most objects fit
_ROOM = _PACKET - 8  # beside the number of bytes of the body, and a mark
_MARK = b"Tr"  # after that number: what another collective sent has none


def broadcast_object(strategy: Ranked, obj: T, src: int = 0, device: torch.device | None = None) -> T:
    """Bring the object of one rank to every rank; every rank calls this.

    Args:
        strategy: A strategy or a Fabric: whose ranks.
        obj: On ``src``, whatever can be pickled; tensors on any device.
        src: The rank whose object it is.
        device: Where tensors arrive that are not on the CPU on ``src``. Default: on the CPU.

    Returns:
        The object of ``src``; on ``src`` the object itself.
    """
    if strategy.world_size == 1:
        return obj
    host, here = host_group(), strategy.global_rank == src
    parcel = _parcel(obj) if here else None
    packet = _packet(parcel.body) if parcel is not None else torch.empty(_PACKET, dtype=torch.uint8, device="cpu")
    host.broadcast(packet, src)
    move = functools.partial(_broadcast_part, host, src)
    if parcel is None:
        received: T = _opened(_body(packet, move), move, device)
        return received
    for part in parcel.rest():
        move(part)
    return obj


def gather_objects(strategy: Ranked, obj: T, dst: int = 0) -> list[T] | None:
    """Bring the objects of all ranks to one of them; every rank calls this.

    No other rank holds more than its own object, and ``dst`` no more than what is returned.

    Args:
        strategy: A strategy or a Fabric: whose ranks.
        obj: Whatever can be pickled; tensors on any device.
        dst: The rank that gets the objects.

    Returns:
        On ``dst`` the objects in the order of the ranks, those of the others with tensors on the CPU; elsewhere None.
    """
    if strategy.world_size == 1:
        return [obj]
    group, rank = host_group().group, strategy.global_rank
    if rank != dst:
        parcel = _parcel(obj)
        dist.gather(_packet(parcel.body), dst=dst, group=group)
        for part in parcel.rest():
            for chunk in torch.split(part, _CHUNK):
                dist.send(chunk, dst, group)
        return None
    packets = [torch.empty(_PACKET, dtype=torch.uint8, device="cpu") for _ in range(strategy.world_size)]
    dist.gather(packets[dst].zero_(), packets, dst=dst, group=group)
    arriving: list[Any] = []

    def receive(src: int, part: Tensor) -> None:  # from all ranks at the same time
        arriving.extend(dist.irecv(chunk, src, group) for chunk in torch.split(part, _CHUNK))

    def arrive() -> None:
        for work in arriving:
            work.wait()
        arriving.clear()

    others = {src: packet for src, packet in enumerate(packets) if src != dst}
    bodies = {src: _body(packet, functools.partial(receive, src)) for src, packet in others.items()}
    arrive()
    parts = {src: _Parts(body, functools.partial(receive, src)) for src, body in bodies.items()}
    arrive()
    return [obj if src == dst else parts[src].put_together(None) for src in range(strategy.world_size)]


def all_gather_objects(strategy: Ranked, obj: T) -> list[T]:
    """Bring the objects of all ranks to every rank; every rank calls this.

    It takes one message from each rank, and some more for an object that is large.

    Args:
        strategy: A strategy or a Fabric: whose ranks.
        obj: Whatever can be pickled; tensors on any device.

    Returns:
        The objects in the order of the ranks; those of the other ranks have their tensors on the CPU.
    """
    if strategy.world_size == 1:
        return [obj]
    host, rank = host_group(), strategy.global_rank
    parcel = _parcel(obj)
    packets = [torch.empty(_PACKET, dtype=torch.uint8, device="cpu") for _ in range(strategy.world_size)]
    dist.all_gather(packets, _packet(parcel.body), group=host.group)
    found: list[T] = []
    for src, packet in enumerate(packets):
        move = functools.partial(_broadcast_part, host, src)
        if src != rank:
            found.append(_opened(_body(packet, move), move, None))
            continue
        for part in parcel.rest():
            move(part)
        found.append(obj)
    return found


def _broadcast_part(host: HostGroup, src: int, part: Tensor) -> None:
    for chunk in torch.split(part, _CHUNK):
        dist.broadcast(chunk, src, group=host.group)


# --- how an object is sent ---


class _Parcel(NamedTuple):
    body: bytearray
    """The number of bytes of the contents; these, pickled; and the bytes of all small parts."""
    large: list[Tensor]

    def rest(self) -> Iterator[Tensor]:
        """What does not fit into the packet, a row of bytes each."""
        if len(self.body) > _ROOM:
            yield torch.frombuffer(self.body, dtype=torch.uint8)[_ROOM:]
        yield from self.large


class _Contents(NamedTuple):
    stream: bytes
    """The object without its storages and buffers."""
    sizes: list[int]
    """The bytes of each storage, and then of each buffer, such as that of an array."""
    on_device: list[bool]
    """Of each storage, whether it is not on the CPU where the object comes from."""


def _parcel(obj: Any) -> _Parcel:
    stream, storages, buffers = tensor_pickle.dump_to_send(obj)
    parts = [*map(_bytes_of_storage, storages), *map(_bytes_of_buffer, buffers)]
    contents = _Contents(stream, [len(part) for part in parts], [s.device.type != "cpu" for s in storages])
    pickled = pickle.dumps(tuple(contents), protocol=pickle.HIGHEST_PROTOCOL)
    small = [part for part in parts if len(part) < _LARGE]
    body = bytearray(8 + len(pickled) + sum(map(len, small)))
    body[:8] = len(pickled).to_bytes(8, "little")
    place = 8 + len(pickled)
    body[8:place] = pickled
    whole = torch.frombuffer(body, dtype=torch.uint8)
    for part in small:
        whole[place : place + len(part)] = part
        place += len(part)
    return _Parcel(body, [part for part in parts if len(part) >= _LARGE])


def _packet(body: bytearray) -> Tensor:
    packet = bytearray(_PACKET)
    packet[:8] = len(body).to_bytes(6, "little") + _MARK
    first = body[:_ROOM]
    packet[8 : 8 + len(first)] = first
    return torch.frombuffer(packet, dtype=torch.uint8)


def _body(packet: Tensor, receive: Callable[[Tensor], None]) -> bytearray:
    """The body whose begin is in a packet; ``receive`` fills the rest, perhaps later."""
    head = bytes(packet[:8].tolist())
    if head[6:] != _MARK:
        raise MisconfigurationException(
            "This rank waited for an object of another rank, and got something else: the ranks do not make the same"
            " calls in the same order. Look for a call of all ranks under a condition that only some ranks meet."
        )
    body = bytearray(int.from_bytes(head[:6], "little"))
    whole = torch.frombuffer(body, dtype=torch.uint8)
    first = packet[8 : 8 + min(len(body), _ROOM)]
    whole[: len(first)] = first
    if len(body) > _ROOM:
        receive(whole[_ROOM:])
    return body


def _opened(body: bytearray, receive: Callable[[Tensor], None], device: torch.device | None) -> Any:
    return _Parts(body, receive).put_together(device)


class _Parts:
    """The parts of an object that arrives.

    Args:
        body: The body, complete.
        receive: Fills a part with what arrives next, perhaps later.
    """

    def __init__(self, body: bytearray, receive: Callable[[Tensor], None]) -> None:
        end = 8 + int.from_bytes(body[:8], "little")
        with memoryview(body) as view:
            self._contents = _Contents(*pickle.loads(view[8:end]))
        whole = torch.frombuffer(body, dtype=torch.uint8)
        self._memory: list[Any] = []
        for number, size in enumerate(self._contents.sizes):
            memory, part = _memory_for(size, is_storage=number < len(self._contents.on_device))
            self._memory.append(memory)
            if size >= _LARGE:
                receive(part)
            else:
                part.copy_(whole[end : end + size])
                end += size

    def put_together(self, device: torch.device | None) -> Any:
        """The object, once all parts have arrived; ``device`` as in :func:`broadcast_object`."""
        stream, _, on_device = self._contents
        storages, buffers = self._memory[: len(on_device)], self._memory[len(on_device) :]
        if device is not None and device.type != "cpu":
            storages = [s.to(device=device) if moved else s for s, moved in zip(storages, on_device, strict=True)]
        return tensor_pickle.load(stream, storages, buffers)


def _memory_for(size: int, *, is_storage: bool) -> tuple[Any, Tensor]:
    """Memory for a part, as a storage or as a buffer of Python, and the row of its bytes."""
    if is_storage or not size:
        part = torch.empty(size, dtype=torch.uint8, device="cpu")
        return part.untyped_storage() if is_storage else bytearray(), part
    memory = bytearray(size)
    return memory, torch.frombuffer(memory, dtype=torch.uint8)


def _bytes_of_storage(storage: torch.UntypedStorage) -> Tensor:
    on_host: torch.UntypedStorage = storage.cpu()  # type: ignore[no-untyped-call]  # itself, if it is there already
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(on_host)


def _bytes_of_buffer(buffer: pickle.PickleBuffer) -> Tensor:
    view = buffer.raw()
    if not view.nbytes:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)
