"""Parameters that every rank has whole, in a module whose other parameters are sharded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from treadle_fabric.checkpoint.distributed.split import is_sharded_tensor

__all__ = ["ReplicatedGradients", "scalars_of"]


def scalars_of(module: Module) -> set[Parameter]:
    """The parameters without dimensions: ``fully_shard`` cannot cut them."""
    return {p for p in module.parameters() if p.ndim == 0 and not is_sharded_tensor(p)}


class ReplicatedGradients:
    """Averages the gradients of some parameters over process groups, at the end of each backward pass.

    What was accumulated before is the same on all ranks, so that its mean is itself.

    Args:
        parameters: The same on all ranks, in the same order.
        groups: The process groups, one after the other. The mean of means is that over all.
        synchronizes: Whether the backward pass that runs reduces gradients.
    """

    def __init__(
        self, parameters: Sequence[Parameter], groups: Sequence[Any], synchronizes: Callable[[], bool]
    ) -> None:
        self.parameters, self._groups, self._synchronizes = list(parameters), list(groups), synchronizes
        self._queued = False
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._reached)  # type: ignore[no-untyped-call]

    def _reached(self, parameter: Tensor) -> None:
        if self._synchronizes() and not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self.average)

    def average(self) -> None:
        """Average now; every rank calls this."""
        self._queued = False
        trained = [p for p in self.parameters if p.requires_grad]
        for group in self._groups if trained else ():
            there = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
            # the number of ranks that have each gradient comes along, in the same message
            dtype = torch.float64 if any(p.dtype is torch.float64 for p in trained) else torch.float32
            had = [torch.full((), float(p.grad is not None), dtype=dtype, device=p.device) for p in trained]
            packed = torch.stack([*(t.to(dtype) for t in there), *had])
            dist.all_reduce(packed, group=group)
            means, counts = packed[: len(there)] / dist.get_world_size(group), packed[len(there) :]
            for parameter, mean, count in zip(trained, means, counts, strict=True):
                if parameter.grad is not None or count.item():  # the host waits for the device only where it has none
                    parameter.grad = mean.to(parameter.dtype).reshape(parameter.shape)
