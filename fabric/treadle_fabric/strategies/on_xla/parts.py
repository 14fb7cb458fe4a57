"""The parts of parameters that ``XlaFullyShardedDataParallel`` cuts along the first dimension, as DTensors on the host.

Each process has the same number of rows, zeros at the end included; without these, the rows are those that a DTensor
has there, so that every strategy reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treadle_fabric.checkpoint import fill

__all__ = ["as_dtensor", "is_part", "local_part", "whole_shape"]


def is_part(parameter: Any) -> bool:
    """Whether a parameter is the part of this process."""
    return getattr(parameter, "_is_sharded", False) is True


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole of a parameter of which this is the part of this process."""
    shape: torch.Size = parameter._orig_size  # type: ignore[attr-defined]
    return shape


def as_dtensor(part: Tensor, shape: torch.Size, mesh: Any) -> Any:
    """The DTensor of which this process has a part.

    Args:
        part: On the host, of the shape of the parameter's part.
        shape: Of the whole.
        mesh: Of all processes' hosts.
    """
    from torch.distributed.tensor import DTensor, Shard  # heavy

    rows = max(0, min(part.size(0), shape[0] - mesh.get_rank() * part.size(0)))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part[:rows].contiguous(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def local_part(source: Tensor, part: Tensor, shape: torch.Size, mesh: Any) -> Tensor:
    """The part of this process, on the host, of a whole tensor, a stored one or a DTensor.

    Args:
        source: Of the shape of the whole.
        part: Of the shape and dtype of the result.
        shape: Of the whole.
        mesh: Of all processes' hosts.
    """
    padded = torch.zeros(part.shape, dtype=part.dtype)
    target = as_dtensor(padded, shape, mesh)
    fill(target, source)
    own = target.to_local()
    padded[: own.size(0)] = own
    return padded
