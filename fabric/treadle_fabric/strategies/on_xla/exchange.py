"""How processes exchange tensors on devices of XLA: from device to device, or over the hosts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Exchange", "OverDevices", "OverHosts", "find_exchange"]

_DTYPES: Final = frozenset(
    {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.int8}
)


class Exchange(ABC):
    """Exchanges tensors on devices of XLA among all processes.

    Args:
        rank: This process.
        size: The number of processes.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    @abstractmethod
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over the processes into each tensor."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: Any) -> Tensor:
        """The reduced tensor, a new one, by a ``torch.distributed.ReduceOp``."""

    @abstractmethod
    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, stacked; gradients flow back."""

    @abstractmethod
    def place_in(self, sharded: Any) -> None:
        """Let an ``XlaFullyShardedDataParallel`` use this exchange, and not its own."""


class OverDevices(Exchange):
    """XLA's own collectives, which are part of what is recorded for the devices: no host waits.

    Args:
        rank: This process.
        size: The number of processes.
        order: PJRT's number for the device of each process. Default: its rank.
    """

    def __init__(self, rank: int, size: int, order: Sequence[int] = ()) -> None:
        super().__init__(rank, size)
        self._order = list(order) if list(order) != list(range(size)) else []

    def takes(self, tensor: Tensor, op: Any = None) -> bool:
        """Whether the tensor is on a device, and its dtype and the ``torch.distributed.ReduceOp`` are there."""
        return tensor.device.type == "xla" and tensor.dtype in _DTYPES and (op is None or op in _REDUCTIONS)

    def average(self, tensors: Sequence[Tensor]) -> None:
        import torch_xla.core.xla_model as xm  # an extra

        if tensors:
            xm.all_reduce(xm.REDUCE_SUM, list(tensors), scale=1.0 / self.size, pin_layout=False)

    def all_reduce(self, tensor: Tensor, op: Any) -> Tensor:
        import torch_xla.core.xla_model as xm  # an extra

        reduced: Tensor = xm.all_reduce(_REDUCTIONS[op], tensor, pin_layout=False)
        return reduced

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered: Tensor = _GatherOnDevices.apply(tensor)  # type: ignore[no-untyped-call]
        return gathered[self._order] if self._order else gathered

    def place_in(self, sharded: Any) -> None:
        """Nothing: these collectives are what the module uses."""


class OverHosts(Exchange):
    """Copies on the hosts, which the process group exchanges: for devices that PJRT does not connect, as CPUs."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        for tensor, mean in zip(tensors, self._means(tensors), strict=True):
            tensor.copy_(mean)

    def _means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        by_dtype: dict[torch.dtype, list[int]] = {}
        for index, tensor in enumerate(tensors):
            by_dtype.setdefault(tensor.dtype, []).append(index)
        means: list[Any] = [None] * len(tensors)
        for indices in by_dtype.values():
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in indices]).cpu()
            dist.all_reduce(flat)
            parts = torch.split(flat / self.size, [tensors[i].numel() for i in indices])
            for i, part in zip(indices, parts, strict=True):
                means[i] = part.view(tensors[i].shape)
        return means

    def all_reduce(self, tensor: Tensor, op: Any) -> Tensor:
        reduced = tensor.detach().cpu()
        dist.all_reduce(reduced, op=op)
        return reduced.to(tensor.device)

    def all_gather(self, tensor: Tensor) -> Tensor:
        mine = tensor.detach().cpu().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return torch.stack(parts).to(tensor.device)

    def place_in(self, sharded: Any) -> None:
        sharded.all_gather_op = self._gather_parts
        sharded.all_reduce_op = self._reduce_norm
        sharded.reduce_scatter_op = _ReduceScatter(self)

    def _gather_parts(self, value: Tensor, dim: int = 0, groups: Any = None) -> Tensor:
        return self.all_gather(value).flatten(0, 1)

    def _reduce_norm(self, kind: str, value: Tensor, scale: float = 1.0, groups: Any = None) -> Tensor:
        return self.all_reduce(value, dist.ReduceOp.MAX if kind == "max" else dist.ReduceOp.SUM) * scale


class _ReduceScatter:
    """Sums gradients over the processes, of which each gets its part."""

    def __init__(self, exchange: OverHosts) -> None:
        self._exchange = exchange
        self.scale = 1.0

    def __call__(self, gradient: Tensor, then: Callable[[Tensor], None]) -> None:
        exchange = self._exchange
        part = exchange.all_reduce(gradient, dist.ReduceOp.SUM).chunk(exchange.size)[exchange.rank]
        then(part * self.scale)

    def flush(self) -> None:
        """Nothing: no gradient waits for others."""


class _GatherOnDevices(torch.autograd.Function):
    """A gather whose gradient is the sum of what every process did with this one's part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        import torch_xla.core.xla_model as xm  # an extra

        gathered: Tensor = xm.all_gather(tensor.unsqueeze(0), dim=0, pin_layout=False)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        import torch_xla.core.xla_model as xm  # an extra
        import torch_xla.runtime as xr

        return xm.all_reduce(xm.REDUCE_SUM, gradient, pin_layout=False)[xr.global_ordinal()]


_REDUCTIONS: Final[dict[Any, str]] = {
    dist.ReduceOp.SUM: "sum",
    dist.ReduceOp.PRODUCT: "mul",
    dist.ReduceOp.MIN: "min",
    dist.ReduceOp.MAX: "max",
}


def find_exchange(rank: int, size: int, order: Sequence[int] = ()) -> Exchange:
    """The exchange for this process: over the devices where PJRT connects those of all processes.

    Args:
        rank: This process.
        size: The number of processes.
        order: PJRT's number for the device of each process. Default: its rank.
    """
    import torch_xla.runtime as xr  # an extra

    return OverDevices(rank, size, order) if xr.world_size() == size > 1 else OverHosts(rank, size)
