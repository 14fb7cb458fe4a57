"""The group of all ranks that reaches host memory, for what the ranks' hosts decide, send and wait for.

A default group of NCCL reaches memory of devices only. A number of the host that is sent through such a group waits
twice for what the device has yet to do, and an object needs memory there. So it has a group of gloo beside it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from treadle_fabric.coordination.rendezvous import new_group

__all__ = [
    "HostGroup",
    "group_apart",
    "host_group",
    "patient_barrier",
    "reached_by",
    "wait_for_rank_zero",
    "waits_in_vain",
]

_SLICE = timedelta(seconds=0.2)  # until an interrupt is seen
_NO_LIMIT = timedelta(days=365)


class HostGroup:
    """Collectives of all ranks on host memory. Python's signal handlers run while a rank waits in one.

    A *patient* wait is one for ranks that work, be it for hours: they download data, or write a checkpoint. There the
    timeout begins only where no rank works any more, because all of them wait patiently: they are then at different
    places of the program, and get an error. Every other wait ends with the timeout of the group.

    A patient rank waits in gloo, and not for a key in the store: gloo sees at once when another rank has ended, on this
    machine or another one, with an error or without.

    Args:
        group: The process group.
        timeout: How long all ranks may wait patiently for one another at different places.
    """

    def __init__(self, group: Any, timeout: timedelta) -> None:
        self.group = group
        """The process group."""
        self._timeout = timeout
        self._in_slices = "cpu:gloo" in dist.get_backend_config(group)
        on_host = "cpu" in reached_by(group)
        self._device: Any = "cpu" if on_host else torch.accelerator.current_accelerator()

    def barrier(self, what: str = "a barrier", *, patient: bool = False) -> None:
        """Wait until every rank has called this.

        Args:
            what: What ranks wait at, for an error.
            patient: Whether to wait patiently. Default: False.
        """
        options = torch._C._distributed_c10d.BarrierOptions()
        options.device = torch.device("cpu")
        if patient:
            options.timeout = _NO_LIMIT
        self._wait(self.group.barrier(options), what, patient)

    def broadcast(self, tensor: Tensor, src: int, *, patient: bool = False) -> None:
        """Fill a tensor in host memory with that of the rank ``src``; the arguments are those of :meth:`barrier`."""
        options = torch._C._distributed_c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        if patient:
            options.timeout = _NO_LIMIT
        self._wait(self.group.broadcast([tensor], options), f"a wait for rank {src}", patient)

    def largest(self, values: Sequence[int], *, patient: bool = False) -> list[int]:
        """Of each of some numbers the largest that any rank has; every rank calls this with the same number of them."""
        options = torch._C._distributed_c10d.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
        if patient:
            options.timeout = _NO_LIMIT
        found = torch.tensor(values, dtype=torch.int64, device=self._device)
        self._wait(self.group.allreduce([found], options), "a comparison", patient)
        numbers: list[int] = found.tolist()
        return numbers

    def bytes_of(self, src: int, data: bytes = b"") -> bytes:
        """Bring bytes of the rank ``src`` to every rank; the others give none."""
        size = torch.tensor([len(data)], dtype=torch.int64, device=self._device)
        self.broadcast(size, src)
        body = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        if self.group.rank() == src:
            body.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else body)
        if len(body):
            self.broadcast(body, src)
        return data if self.group.rank() == src else body.cpu().numpy().tobytes()

    def gather_bytes(self, data: bytes) -> list[bytes] | None:
        """Bring the bytes of all ranks to rank 0, and to no other rank; every rank calls this.

        Returns:
            On rank 0 what the ranks gave, in their order; elsewhere None.
        """
        if self.group.rank() == 0:
            return [data, *(self._receive(src) for src in range(1, self.group.size()))]
        size = torch.tensor([len(data)], dtype=torch.int64, device=self._device)
        self.group.send([size], 0, 0).wait()
        if data:
            body = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
            self.group.send([body], 0, 0).wait()
        return None

    def _receive(self, src: int) -> bytes:
        size = torch.empty(1, dtype=torch.int64, device=self._device)
        self.group.recv([size], src, 0).wait()
        body = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        if len(body):
            self.group.recv([body], src, 0).wait()
        return body.cpu().numpy().tobytes()

    def vote(self, decision: bool) -> Callable[[], int]:
        """Begin to count the ranks that decided for something; every rank calls this.

        Returns:
            What waits until every rank has voted, but for no device, and returns the number of those for it.
        """
        count = torch.tensor(int(decision), device="cpu")
        work: Any = dist.all_reduce(count, group=self.group, async_op=True)

        def counted() -> int:
            work.wait()
            return int(count)

        return counted

    def _wait(self, work: Any, what: str, patient: bool) -> None:
        if not self._in_slices:
            work.wait()
            return
        until = time.monotonic() + (self._timeout.total_seconds() if patient else math.inf)
        try:
            while not _is_done(work, _SLICE):
                if time.monotonic() > until:
                    self._wait_with_others(work, what)
                    return
        except BaseException:  # an interrupt, say
            if not work.is_completed():
                _abandoned.append(work)
            raise

    def _wait_with_others(self, work: Any, what: str) -> None:
        """Go on waiting as long as any rank does something else."""
        store: Any = dist.distributed_c10d._get_default_store()
        key, size, seen = f"treadle/waiting/{self.group.group_name}", self.group.size(), 0
        store.add(key, 1)
        try:
            while not _is_done(work, _SLICE):
                seen = seen + 1 if store.add(key, 0) == size else 0
                if seen > 2:  # a rank whose wait has ended says so within this time
                    milliseconds = int(self._timeout.total_seconds() * 1000)
                    raise dist.DistBackendError(
                        f"Rank {self.group.rank()} ran into the timeout in {what}, after {milliseconds}ms in which"
                        " every rank waited for the others: they are not at the same call."
                    )
        finally:
            if seen <= 2:
                with contextlib.suppress(RuntimeError):  # the store went with its process
                    store.add(key, -1)


def _is_done(work: Any, limit: timedelta) -> bool:
    """Wait for so long.

    Raises:
        RuntimeError: The work failed.
    """
    try:
        work.wait(limit)
    except RuntimeError:
        pass
    else:
        return True
    if not work.is_completed():
        return False
    work.wait()  # it may have come to its end after the limit, and before the question
    return True


def reached_by(group: Any | None) -> list[str]:
    """The types of the devices whose memory a group reaches, the default group or another one."""
    return [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]


def patient_barrier(what: str) -> None:
    """Wait patiently until every rank is here, because some of them work; alone, return at once."""
    if _are_several():
        host_group().barrier(what, patient=True)


def wait_for_rank_zero() -> None:
    """Wait patiently until rank 0 is here, which works; rank 0 goes on at once."""
    if _are_several():
        host_group().broadcast(torch.zeros(1, dtype=torch.uint8, device="cpu"), 0, patient=True)


def group_apart() -> HostGroup:
    """Make a group of gloo of all ranks for a thread of its own, beside which the ranks train; every rank calls this.

    It lives for as long as it is referred to, also where the default group is destroyed before.
    """
    timeout = host_group()._timeout
    return HostGroup(new_group(backend="gloo", timeout=timeout), timeout)


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


_abandoned: list[Any] = []


def waits_in_vain() -> bool:
    """Whether something that nobody waits for any more still goes on in gloo, which no one can end but the other ranks.

    A process that ends waits for it.
    """
    return not all(work.is_completed() for work in _abandoned)


class _Beside(NamedTuple):
    timeout: timedelta
    group: Any | None
    """A group of gloo; None beside a default group that reaches the host itself, and must not be kept alive here."""


_beside: WeakKeyDictionary[Any, _Beside] = WeakKeyDictionary()
"""What was made beside each default group."""


def host_group(timeout: timedelta | None = None) -> HostGroup:
    """The host group of the default group; the first call makes it, and every rank makes this call.

    Args:
        timeout: For the first call. Default: that of torch.
    """
    default = dist.group.WORLD
    reaches = "cpu" in reached_by(default)
    found = _beside.get(default)
    if found is None or (found.group is None) != reaches:
        timeout = timeout or default_pg_timeout
        made = None if reaches else new_group(backend="gloo", timeout=timeout)
        found = _beside[default] = _Beside(timeout, made)
    return HostGroup(default if found.group is None else found.group, found.timeout)
