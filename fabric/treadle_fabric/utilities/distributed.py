"""What is about several processes, where users of Lightning Fabric look for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp, group
from torch.utils.data import Dataset, DistributedSampler

from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.launchers.launcher import limit_threads, threads_per_process
from treadle_fabric.measuring import is_shared_filesystem
from treadle_fabric.strategies.parallel import gather_tensor
from treadle_fabric.strategies.reduction import reduction_of

__all__ = [
    "DistributedSamplerWrapper",
    "ReduceOp",
    "_DatasetSamplerWrapper",
    "_InfiniteBarrier",
    "_all_gather_ddp_if_available",
    "_destroy_dist_connection",
    "_distributed_is_initialized",
    "_gather_all_tensors",
    "_get_default_process_group_backend_for_device",
    "_init_dist_connection",
    "_is_dtensor",
    "_set_num_threads_if_needed",
    "_suggested_max_num_threads",
    "_sync_ddp",
    "_sync_ddp_if_available",
    "group",
    "is_shared_filesystem",
]

_suggested_max_num_threads = threads_per_process
_set_num_threads_if_needed = limit_threads


def _distributed_is_initialized() -> bool:
    """Whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()


def _gather_all_tensors(result: Tensor, group: Any = None) -> list[Tensor]:
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


def _sync_ddp_if_available(result: Tensor, group: Any = None, reduce_op: Any = None) -> Tensor:
    """Reduce a tensor over all ranks; without a process group the tensor stays as it is."""
    return _sync_ddp(result, group, reduce_op) if _distributed_is_initialized() else result


def _sync_ddp(result: Tensor, group: Any = None, reduce_op: Any = None) -> Tensor:
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


def _all_gather_ddp_if_available(tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
    """Gather a tensor of all ranks, with a new first dimension; without a process group it stays as it is.

    Args:
        tensor: The tensor of this rank, of the same shape on all.
        group: The process group. Default: all ranks.
        sync_grads: Whether gradients go back through the gather.
    """
    return gather_tensor(tensor, group, sync_grads) if _distributed_is_initialized() else tensor


def _init_dist_connection(
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


def _destroy_dist_connection() -> None:
    """Leave the process group, if this process is in one."""
    if _distributed_is_initialized():
        dist.destroy_process_group()


def _get_default_process_group_backend_for_device(device: torch.device) -> str:
    """The backend of ``torch.distributed`` for a kind of device; "gloo" where torch names none."""
    return dist.Backend.default_device_backend_map.get(device.type, "gloo")


def _is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor  # takes a second

    return isinstance(tensor, DTensor)


class _DatasetSamplerWrapper(Dataset[Any]):
    """What a sampler yields, as a dataset. It is drawn once for each :meth:`reset`.

    Args:
        sampler: A sampler, or a batch sampler, with a length.
    """

    def __init__(self, sampler: Iterable[Any]) -> None:
        if not hasattr(sampler, "__len__"):
            raise TypeError(
                f"{type(sampler).__name__} has no length, and ranks share out what has one: define __len__."
            )
        self._sampler: Any = sampler
        self._drawn: list[Any] | None = None

    def __getitem__(self, index: int) -> Any:
        if self._drawn is None:
            self._drawn = list(self._sampler)
        return self._drawn[index]

    def __len__(self) -> int:
        return len(self._sampler)

    def reset(self) -> None:
        """Draw anew."""
        self._drawn = list(self._sampler)


class DistributedSamplerWrapper(DistributedSampler[Any]):
    """Shares out over the ranks what any sampler yields.

    Args:
        sampler: A sampler, or a batch sampler, with a length.
        *args: As for ``torch.utils.data.DistributedSampler``.
        **kwargs: As for ``torch.utils.data.DistributedSampler``.
    """

    def __init__(self, sampler: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(_DatasetSamplerWrapper(sampler), *args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        drawn: Any = self.dataset
        drawn.reset()
        return (drawn[index] for index in super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler inside the epoch, too."""
        super().set_epoch(epoch)
        inside = getattr(self.dataset, "_sampler", None)
        if callable(setter := getattr(inside, "set_epoch", None)):
            setter(epoch)


class _InfiniteBarrier:
    """Within this context, a call waits for the other ranks as long as it takes: ten days."""

    def __init__(self) -> None:
        self.group: Any = None
        self.barrier: Any = lambda: None

    def __call__(self) -> None:
        self.barrier()

    def __enter__(self) -> Self:
        if _distributed_is_initialized():
            from datetime import timedelta  # not used otherwise

            self.group = dist.new_group(backend="gloo", timeout=timedelta(days=10))
            self.barrier = self.group.barrier
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.barrier()
        if self.group is not None:
            dist.destroy_process_group(self.group)
