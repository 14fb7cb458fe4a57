"""Apply torch's ``fully_shard`` to a module and its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

from treadle_fabric.precision import Precision
from treadle_fabric.strategies.sharding.arguments import ShardingOptions, mixed_precision_policy
from treadle_fabric.strategies.sharding.engine import ShardedEngine
from treadle_fabric.strategies.sharding.materialize import materialize
from treadle_fabric.strategies.sharding.recompute import recompute_activations
from treadle_fabric.strategies.sharding.replicated import scalars_of
from treadle_fabric.strategies.sharding.wrapping import modules_to_shard
from treadle_fabric.strategies.unwrapping import user_module

__all__ = ["shard_module"]


def shard_module(
    module: Module, mesh: Any, options: ShardingOptions, precision: Precision, device: torch.device
) -> ShardedEngine:
    """Shard a module over the processes of a mesh.

    Args:
        module: The user's module, or its compiled form.
        mesh: Of one dimension; or of two, along the first of which the processes have copies of the parts.
        options: What is sharded, and how.
        precision: Whose dtypes the gathered parameters have.
        device: Where the parts lie.

    Returns:
        The engine that runs the module.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard  # heavy

    own = user_module(module)
    parts = modules_to_shard(own, options.policy)
    recompute_activations(own, options)
    offload = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available()) if options.offload else OffloadPolicy()
    arguments: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(**mixed_precision_policy(precision, options.mixed_precision)),
        "offload_policy": offload,
        "reshard_after_forward": options.reshard_after_forward,
    }
    scalars = scalars_of(own) - set(options.ignored)
    if whole := {*options.ignored, *scalars}:
        arguments["ignored_params"] = whole
    engine = ShardedEngine(module)
    for part in (*parts, engine):
        fully_shard(part, **arguments)
    engine.sharded()
    materialize(own, torch.device("cpu") if options.offload else device)
    if scalars:
        names = {p: name for name, p in own.named_parameters()}
        engine.replicate(sorted(scalars, key=lambda p: names[p]), mesh.get_all_groups())
    return engine
