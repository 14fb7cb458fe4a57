"""Apply torch's ``fully_shard`` to a module and its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from treadle_fabric.precision import Precision
from treadle_fabric.strategies.sharding.arguments import ShardingOptions, dtypes_for
from treadle_fabric.strategies.sharding.engine import ShardedEngine
from treadle_fabric.strategies.sharding.materialize import give_values
from treadle_fabric.strategies.sharding.recompute import recompute
from treadle_fabric.strategies.sharding.replicated import scalars_of
from treadle_fabric.strategies.sharding.wrapping import modules_to_shard
from treadle_fabric.strategies.unwrapping import user_module

__all__ = ["shard_module"]


def shard_module(
    module: Module,
    mesh: Any,
    options: ShardingOptions,
    precision: Precision,
    device: torch.device,
    broadcast: Callable[[Any], Any],
) -> ShardedEngine:
    """Shard a module over the processes of a mesh.

    Args:
        module: The user's module, or its compiled form.
        mesh: Of one dimension; or of two, along the first of which the processes have copies of the parts.
        options: What is sharded, and how.
        precision: Whose dtypes the gathered parameters have.
        device: Where the parts lie.
        broadcast: Returns what rank 0 has.

    Returns:
        The engine that runs the module.
    """
    from torch.distributed.fsdp import fully_shard  # heavy

    own = user_module(module)
    ignored = options.ignored_parameters()
    parts = modules_to_shard(own, options.policy, ignored)
    if options.recomputes:
        recompute(own, options.recompute_policy, options.recompute_saved)
    dtypes = dtypes_for(precision.precision, options.dtypes)
    if dtypes.buffer_dtype is not None:
        _cast_buffers(own, dtypes.buffer_dtype)
    arguments: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": dtypes.policy(),
        "offload_policy": options.offload_policy(device),
        "reshard_after_forward": options.reshard_after_forward,
    }
    scalars = scalars_of(own) - ignored
    if whole := {*ignored, *scalars}:
        arguments["ignored_params"] = whole
    engine = ShardedEngine(module)
    for part in (*parts, engine):
        fully_shard(part, **arguments)
    engine.sharded()
    give_values(engine, precision, device, broadcast, torch.device("cpu") if options.offload else None)
    if scalars:
        names = {p: name for name, p in own.named_parameters()}
        engine.replicate(sorted(scalars, key=lambda p: names[p]), mesh.get_all_groups())
    return engine


def _cast_buffers(module: Module, dtype: torch.dtype) -> None:
    for each in module.modules():
        for name, buffer in each._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                each._buffers[name] = buffer.to(dtype)
