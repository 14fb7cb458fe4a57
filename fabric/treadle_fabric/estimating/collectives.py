"""Which collectives a rank takes part in, and how many bytes each of them moves."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["KINDS", "Call", "call_of", "is_collective", "make_work", "returned_by", "wire_bytes"]

KINDS: Final = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "recv", "other")
"""The kinds of collectives, in the order of a table."""

_NAMESPACES: Final = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
_GROUPS: Final = ("process_group", "group_name")
_KIND_BY_NAME: Final = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "shard_dim_alltoall": "all_to_all",
    "broadcast": "broadcast",
    "send": "send",
    "isend": "send",
    "recv": "recv",
    "irecv": "recv",
}
_SILENT: Final = ("barrier", "monitored_barrier", "batch_p2p_ops")


class Call(NamedTuple):
    """One call of a collective by this rank."""

    kind: str
    """One of :data:`KINDS`."""
    payload: int
    """Bytes of the whole message: the tensor that is reduced, broadcast or sent; what is gathered in all; what is
    scattered in all."""
    ranks: tuple[int, ...]
    """The global ranks that take part."""


def is_collective(func: Any) -> bool:
    """Whether an operator of torch is called for a process group."""
    return func.namespace in _NAMESPACES and any(each.name in _GROUPS for each in func._schema.arguments)


def call_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[Call | None, list[Tensor]]:
    """Describe a collective, and say which tensors hold its message on this rank.

    An operator that moves nothing, such as a barrier, is no call.

    Args:
        func: An operator for which :func:`is_collective`.
        args: Its arguments by position.
        kwargs: Its arguments by name.
        result: What it returned.
    """
    name = func._opname.strip("_")
    if name in _SILENT:
        return None, []
    for ending in ("_out", "_coalesced", "_into_tensor", "_tensor", "_base", "_single", "_any_source"):
        name = name.removesuffix(ending)
    values = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | kwargs
    inputs = [t for key, value in values.items() if not key.startswith("out") for t in _tensors(value)]
    outputs = [t for key, value in values.items() if key.startswith("out") for t in _tensors(value)]
    if func.namespace != "c10d" and not outputs:
        outputs = [*_tensors(result)]
    payload = max(_bytes(inputs), _bytes(outputs))
    ranks = _ranks_of(_group_of(values))
    return Call(_KIND_BY_NAME.get(name, "other"), payload, ranks), [*inputs, *outputs]


def wire_bytes(kind: str, payload: int, ranks: int) -> float:
    """Bytes that a rank sends where a collective runs as a ring over so many ranks.

    The formulas are those of NCCL's tests of performance ("bus bandwidth"): an all-reduce sends 2 (n - 1) / n of its
    message, an all-gather, a reduce-scatter and an all-to-all (n - 1) / n.
    """
    if ranks < 2 or kind == "recv":
        return 0.0
    share = (ranks - 1) / ranks
    factors = {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "all_to_all": share}
    return payload * factors.get(kind, 1.0)


def returned_by(func: Any, args: tuple[Any, ...], work: Callable[[list[Tensor]], Any]) -> Any:
    """Return what a collective of the namespace ``c10d`` returns, without running it.

    Args:
        func: The operator.
        args: Its arguments by position; the message is the first of them.
        work: Makes the handle that a caller waits for, given the tensors that it has when the wait ends.
    """
    tensors = list(_tensors(args[0])) if args else []
    returns = func._schema.returns
    handle = work(tensors)
    if not returns:
        return None
    if len(returns) == 1:
        return handle if "Work" in str(returns[0].type) else args[0]
    return args[0], handle


def make_work(tensors: list[Tensor]) -> Any:
    """Make a handle of a collective that has ended, and left these tensors.

    The handle does not keep the tensors: a caller that needs them has them.
    """
    held = [weakref.ref(tensor) for tensor in tensors]

    class Done(torch._C._distributed_c10d.Work):
        def wait(self, timeout: Any = None) -> bool:
            return True

        def get_future(self) -> Any:
            future: Any = torch.futures.Future()
            future.set_result([tensor for reference in held if (tensor := reference()) is not None])
            return future

    return Done()


def _group_of(values: dict[str, Any]) -> Any:
    group: Any = values.get("process_group", values.get("group_name"))
    if isinstance(group, str):
        functions: Any = dist.distributed_c10d
        return functions._resolve_process_group(group)
    if isinstance(group, dist.ProcessGroup):
        return group
    return torch._C._distributed_c10d.ProcessGroup.unbox(group)


@functools.lru_cache(maxsize=64)
def _ranks_of(group: Any) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
