"""Parameters and buffers that are the same on all ranks, before they are sharded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from treadle_fabric.checkpoint.distributed.split import is_sharded_tensor

__all__ = ["take_over_from_rank_zero"]


def take_over_from_rank_zero(
    module: Module, device: torch.device, skip: Iterable[Tensor] = (), group: Any = None
) -> None:
    """Give every rank the parameters and buffers of rank 0, one after the other, as DDP does.

    Args:
        module: A module on any device; what is on the meta device, or sharded, stays as it is.
        device: Where the ranks can exchange tensors.
        skip: Tensors that stay as they are.
        group: The process group whose first rank gives. Default: all processes.
    """
    skipped = {id(tensor) for tensor in skip}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_meta or id(tensor) in skipped or is_sharded_tensor(tensor):
            continue
        there = tensor.detach().to(device).contiguous()
        dist.broadcast(there, group=group, group_src=0)
        if dist.get_rank(group) and (there.data_ptr() != tensor.data_ptr()):
            tensor.detach().copy_(there)
