"""Which part of each parameter a rank holds under ZeRO, and how that part is filled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from treadle_fabric.checkpoint import in_memory

__all__ = [
    "Held",
    "base_optimizer",
    "full_shape",
    "gathered",
    "held_parts",
    "is_partitioned",
    "put_weight",
    "renew_whole_copies",
]


class Held(NamedTuple):
    """The part of a parameter that this rank's optimizer has."""

    parameter: Parameter
    flat: Tensor
    """The partition, of which the optimizer has a state."""
    start: int
    """Where in ``flat`` the part begins."""
    first: int
    """Where in the flattened parameter it begins."""
    length: int
    """The elements of the parameter in it; behind them ``flat`` has padding."""


def is_partitioned(engine: Any) -> bool:
    """Whether the engine's optimizer has partitions, as under ZeRO 1 to 3."""
    return hasattr(engine.optimizer, "single_partition_of_fp32_groups") or _is_stage_3(engine)


def _is_stage_3(engine: Any) -> bool:
    return hasattr(engine.optimizer, "fp32_partitioned_groups_flat")


def base_optimizer(engine: Any) -> Any:
    """The torch optimizer inside of the engine."""
    return engine.optimizer.optimizer if is_partitioned(engine) else engine.optimizer


def renew_whole_copies(engine: Any) -> None:
    """Give the copies that an optimizer without partitions steps, as in 16 bits, the values of the parameters."""
    renew = getattr(engine.optimizer, "refresh_fp32_params", None)
    if renew is not None and not is_partitioned(engine):
        renew()


def full_shape(parameter: Any) -> torch.Size:
    """The shape of a parameter, of which the rank may hold a part."""
    found: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return found


def master_dtype(engine: Any) -> torch.dtype:
    """The dtype in which the optimizer has the weights."""
    zero = engine.optimizer
    flat = zero.fp32_partitioned_groups_flat if _is_stage_3(engine) else zero.single_partition_of_fp32_groups
    found: torch.dtype = flat[0].dtype
    return found


def held_parts(engine: Any) -> Iterator[Held]:
    """The parts of all parameters that this rank's optimizer has, in the order of the optimizer."""
    zero = engine.optimizer
    if _is_stage_3(engine):
        for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            for parameter in parameters:
                _, start, size = zero.grad_position[zero.get_param_id(parameter)]
                first = min(size * zero._get_param_partition_rank(parameter), parameter.ds_numel)
                yield Held(parameter, flat, int(start), first, min(size, parameter.ds_numel - first))
        return
    for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in parameters:
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Held(parameter, flat, here.start, there.start, here.numel)


def trained(engine: Any) -> set[int]:
    """The ``id`` of each parameter that the optimizer has, also where this rank holds nothing of it."""
    zero = engine.optimizer
    groups = zero.fp16_groups if _is_stage_3(engine) else zero.bit16_groups
    return {id(parameter) for group in groups for parameter in group}


def put_weight(engine: Any, parameter: Any, value: Tensor) -> None:
    """Copy a whole weight into what this rank holds of the parameter that the model computes with.

    Args:
        engine: The engine.
        parameter: Of its module.
        value: The whole of it.
    """
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(value)
        return
    part, rank = parameter.ds_tensor, torch.distributed.get_rank(parameter.ds_process_group)
    first = min(part.numel() * rank, parameter.ds_numel)
    count = min(part.numel(), parameter.ds_numel - first)
    part.data.view(-1)[:count].copy_(value.reshape(-1)[first : first + count])
    if parameter.data.shape == value.shape and parameter.data.numel():  # kept whole on every rank
        parameter.data.copy_(value)


def put_part(held: Held, flat: Tensor, value: Tensor) -> None:
    """Copy a whole tensor's part into a partition.

    Args:
        held: Which part.
        flat: The partition, of weights or of a state.
        value: Whole, of the parameter's shape.
    """
    source = in_memory(value).reshape(-1)
    flat.data[held.start : held.start + held.length].copy_(source[held.first : held.first + held.length])


def gathered(engine: Any, held: dict[int, Held], parameter: Any, key: str | None) -> Tensor:
    """The whole of a weight, or of an entry of its state; every rank calls this.

    Args:
        engine: The engine.
        held: What this rank holds, by the ``id`` of the parameters.
        parameter: Of its module.
        key: The entry of the optimizer's state; ``None`` for the weight.
    """
    import torch.distributed as dist  # with DeepSpeed there is always a process group

    part = held.get(id(parameter))
    if id(parameter) not in trained(engine):
        if not hasattr(parameter, "ds_tensor"):
            whole: Tensor = parameter.detach().clone()
            return whole
        whole = torch.zeros(full_shape(parameter), dtype=parameter.dtype, device=parameter.ds_tensor.device)
        size = parameter.ds_tensor.numel()
        first = min(size * engine.optimizer._get_param_partition_rank(parameter), parameter.ds_numel)
        count = min(size, parameter.ds_numel - first)
        whole.view(-1)[first : first + count] = parameter.ds_tensor.detach().view(-1)[:count]
    else:
        whole = torch.zeros(full_shape(parameter), dtype=master_dtype(engine), device=engine.device)
        if part is not None:
            source = part.flat if key is None else base_optimizer(engine).state[part.flat][key]
            piece = source.detach()[part.start : part.start + part.length]
            whole.view(-1)[part.first : part.first + part.length].copy_(piece)
    dist.all_reduce(whole)  # the parts of the ranks do not overlap
    return whole
