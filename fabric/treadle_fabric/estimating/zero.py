"""What DeepSpeed's ZeRO adds and takes away: arithmetic, because its engine runs on tensors with values only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import ceil
from typing import Any, Final, NamedTuple

from treadle_fabric.estimating.collectives import wire_bytes
from treadle_fabric.estimating.results import Estimate, Traffic

__all__ = ["Zero", "share_out", "zero_of"]

NOTE: Final = (
    "DeepSpeed: by the arithmetic of ZeRO, from a step on one device; its buckets, and what it keeps for a short time,"
    " are of the sizes of its config."
)
_BUCKET: Final = 500_000_000  # numbers: DeepSpeed's default of reduce_bucket_size and allgather_bucket_size


class Zero(NamedTuple):
    """What of a DeepSpeed config decides about memory."""

    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = _BUCKET
    """How many gradients are reduced at a time."""


def zero_of(name: str, strategy: Any) -> Zero | None:
    """The ZeRO settings of a strategy, by its name or its config; None where it is another one."""
    config = getattr(strategy, "config", None)
    if isinstance(config, Mapping) and type(strategy).__name__.startswith("DeepSpeed"):
        zero = config.get("zero_optimization", {})
        bucket = zero.get("reduce_bucket_size", _BUCKET)
        return Zero(
            int(zero.get("stage", 0)),
            _is_given(zero.get("offload_optimizer")),
            _is_given(zero.get("offload_param")),
            int(bucket) if isinstance(bucket, int | float) else _BUCKET,
        )
    if not name.startswith("deepspeed"):
        return None
    stage = next((int(word) for word in name.split("_") if word.isdigit()), 2)
    offload = "offload" in name
    return Zero(stage, offload, offload and stage == 3)


def share_out(alone: Estimate, zero: Zero, name: str, world_size: int, num_nodes: int, largest: int) -> Estimate:
    """Make an estimate under ZeRO of one on a single device.

    The partitions are those of Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models" (2020): stage 1 shares out the optimizer's state, with the copy of the parameters in float32 that training
    in 16 bits needs; stage 2 the gradients, too; stage 3 the parameters as well.

    Args:
        alone: Of the model on one device.
        zero: The settings.
        name: The strategy's.
        world_size: The number of ranks.
        num_nodes: The number of machines.
        largest: The bytes of the largest set of parameters that is gathered at a time under stage 3.
    """
    memory, n = alone.memory, world_size
    whole, width = memory.parameters, max(1, round(memory.parameters / max(alone.parameters, 1)))
    masters = alone.parameters * 4 if width < 4 else 0
    # the optimizer steps the copies: its state has their dtype
    state = memory.optimizer_state * (4 // width if width < 4 else 1) + masters
    state = ceil(state / n) if zero.stage >= 1 else state
    gradients = ceil(memory.gradients / n) if zero.stage >= 2 else memory.gradients
    parameters = ceil(whole / n) if zero.stage == 3 else whole
    bucket = min(zero.bucket * width, whole)
    communication = bucket if n > 1 else 0
    if zero.stage == 3:
        communication += min(2 * largest, whole)  # what is used, and what is fetched meanwhile
    # on one device the activations have gradients that are not reduced yet beside them
    parts = {
        "parameters": 0 if zero.offload_parameters else parameters,
        "buffers": memory.buffers,
        "gradients": 0 if zero.offload_optimizer else gradients,
        "optimizer_state": 0 if zero.offload_optimizer else state,
        "inputs": memory.inputs,
        "communication": communication,
        "activations": memory.activations,
    }
    host = sum((parameters, gradients, state)) - sum(
        parts[each] for each in ("parameters", "gradients", "optimizer_state")
    )
    return dataclasses.replace(
        alone,
        strategy=name,
        world_size=world_size,
        num_nodes=num_nodes,
        memory=dataclasses.replace(
            memory,
            parameters=parameters,
            gradients=gradients,
            optimizer_state=state,
            communication=communication,
            peak=sum(parts.values()),
            peak_parts=parts,
            peak_phase="backward",
            host=host,
        ),
        traffic=_traffic(zero, whole, bucket, n, num_nodes),
        notes=(*alone.notes, NOTE),
    )


def _traffic(zero: Zero, whole: int, bucket: int, ranks: int, num_nodes: int) -> dict[str, Traffic]:
    """Gradients are reduced once; parameters are gathered after the step, or before forward and backward (stage 3)."""
    if ranks == 1:
        return {}
    calls = max(1, ceil(whole / max(bucket, 1)))
    reduction = "reduce_scatter" if zero.stage >= 2 else "all_reduce"
    gathered = {0: 0, 3: 2}.get(zero.stage, 1)
    found = {}
    for kind, times in ((reduction, 1), ("all_gather", gathered)):
        if times:
            sent = round(wire_bytes(kind, whole * times, ranks))
            found[kind] = Traffic(calls * times, whole * times, sent, sent if num_nodes > 1 else 0)
    return found


def _is_given(offload: Any) -> bool:
    return isinstance(offload, Mapping) and offload.get("device", "none") != "none"
