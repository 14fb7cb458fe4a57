"""The parts of parameters that ``XlaFullyShardedDataParallel`` cuts along the first dimension, as DTensors on the host.

Each process has the same number of rows, zeros at the end included; without these, the rows are those that a DTensor
has there, so that every strategy reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from treadle_fabric.checkpoint import fill
from treadle_fabric.checkpoint.host.xla_io import on_host
from treadle_fabric.strategies.parts import is_part, whole_shape

__all__ = ["as_dtensor", "give_part", "local_part", "take_part", "with_whole_states"]


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


def give_part(parameter: Any, value: Tensor) -> Tensor:
    """The DTensor on the host of which this process has ``value``, on its device and of the parameter's shape here."""
    part: Tensor = as_dtensor(on_host([value.detach()])[0], whole_shape(parameter), parameter._treadle_hosts)
    return part


def take_part(parameter: Any, value: Tensor) -> Tensor:
    """The part of this process, on its device, of a tensor of the shape of the whole parameter."""
    own = torch.empty(parameter.shape, dtype=value.dtype, device="meta")
    return local_part(value, own, whole_shape(parameter), parameter._treadle_hosts).to(parameter.device)


def with_whole_states(module: Module, mesh: Any) -> None:
    """Let state dicts of a module have DTensors on the host, and let it load these and whole tensors.

    Args:
        module: The user's module, whose parameters are parts.
        mesh: Of all processes' hosts.
    """

    def give(module: Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name, parameter in module._parameters.items():
            if is_part(parameter) and prefix + name in state:
                part = on_host([state[prefix + name].detach()])[0]
                state[prefix + name] = as_dtensor(part, whole_shape(parameter), mesh)

    def take(module: Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, parameter in module._parameters.items():
            value = state.get(prefix + name)
            if isinstance(value, Tensor) and is_part(parameter) and value.shape == whole_shape(parameter):
                own = torch.empty(parameter.shape, dtype=value.dtype, device="meta")  # type: ignore[union-attr]
                state[prefix + name] = local_part(value, own, value.shape, mesh)

    for parameter in module.parameters():
        parameter._treadle_hosts = mesh  # type: ignore[attr-defined]
    for each in module.modules():
        each.register_state_dict_post_hook(give)  # type: ignore[no-untyped-call]
        each.register_load_state_dict_pre_hook(take)  # type: ignore[no-untyped-call]
