"""Collectives of the process group without a strategy; what they do where there is no group."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from treadle_fabric.coordination import patient_barrier
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.strategies.parallel import gather_tensor
from treadle_fabric.strategies.reduction import reduction_of

__all__ = [
    "PatientBarrier",
    "backend_for",
    "gather_if_distributed",
    "gather_unequal",
    "in_group",
    "is_dtensor",
    "join_group",
    "leave_group",
    "reduce_if_distributed",
    "reduce_tensor",
]


def in_group() -> bool:
    """Whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()


def gather_unequal(result: Tensor, group: Any = None) -> list[Tensor]:
    """Gather the tensors of all ranks, whose sizes may differ; that of this rank keeps its gradient.

    Args:
        result: The tensor of this rank.
        group: The process group. Default: all ranks.
    """
    size = dist.get_world_size(group)
    shapes = [torch.zeros(result.dim(), dtype=torch.int64, device=result.device) for _ in range(size)]
    if result.dim():
        dist.all_gather(shapes, torch.tensor(result.shape, device=result.device), group=group)
    largest = torch.stack(shapes).amax(dim=0).tolist()
    padded = result.detach().new_zeros(largest)
    padded[tuple(slice(length) for length in result.shape)] = result.detach()
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    found = [part[tuple(slice(length) for length in shape.tolist())] for part, shape in zip(parts, shapes, strict=True)]
    found[dist.get_rank(group)] = result
    return found


def reduce_if_distributed(result: Tensor, group: Any = None, reduce_op: Any = None) -> Tensor:
    """Reduce a tensor over all ranks; without a process group the tensor stays as it is."""
    return reduce_tensor(result, group, reduce_op) if in_group() else result


def reduce_tensor(result: Tensor, group: Any = None, reduce_op: Any = None) -> Tensor:
    """Reduce a tensor over all ranks.

    Args:
        result: The tensor of this rank.
        group: The process group. Default: all ranks.
        reduce_op: "sum", "mean" ("avg"), ..., or a ``ReduceOp``. Default: the sum.
    """
    reduction = reduction_of("sum" if reduce_op is None else reduce_op, result.dtype)
    size = dist.get_world_size(group)
    reduced = reduction.begin(result.detach().clone(memory_format=torch.contiguous_format), size)
    dist.all_reduce(reduced, op=reduction.op, group=group)
    return reduction.end(reduced, size)


def gather_if_distributed(tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
    """Gather a tensor of all ranks, with a new first dimension; without a process group it stays as it is.

    Args:
        tensor: The tensor of this rank, of the same shape on all.
        group: The process group. Default: all ranks.
        sync_grads: Whether gradients go back through the gather.
    """
    return gather_tensor(tensor, group, sync_grads) if in_group() else tensor


def join_group(
    cluster_environment: ClusterEnvironment,
    torch_distributed_backend: str,
    global_rank: int | None = None,
    world_size: int | None = None,
    **kwargs: Any,
) -> None:
    """Join the process group of a cluster environment, if this process is in none.

    Args:
        cluster_environment: Has address, port, and what is not given here.
        torch_distributed_backend: "gloo", "nccl", ...
        global_rank: The rank of this process.
        world_size: The number of processes.
        **kwargs: As for ``torch.distributed.init_process_group``.
    """
    if not dist.is_available():
        raise MisconfigurationException("This PyTorch was built without torch.distributed: install one with it.")
    if dist.is_initialized():
        return
    address, port = cluster_environment.main_address, cluster_environment.main_port
    dist.init_process_group(
        torch_distributed_backend,
        init_method=f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}",
        rank=cluster_environment.global_rank() if global_rank is None else global_rank,
        world_size=cluster_environment.world_size() if world_size is None else world_size,
        **kwargs,
    )


def leave_group() -> None:
    """Leave the process group, if this process is in one."""
    if in_group():
        dist.destroy_process_group()


def backend_for(device: torch.device) -> str:
    """The backend of ``torch.distributed`` for a kind of device; "gloo" where torch names none."""
    return dist.Backend.default_device_backend_map.get(device.type, "gloo")


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor  # takes a second

    return isinstance(tensor, DTensor)


class PatientBarrier:
    """Within this context, a call waits for the other ranks as long as they work; so does the end of the context."""

    def __call__(self) -> None:
        patient_barrier("a barrier without a limit")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self()
