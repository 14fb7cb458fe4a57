"""What a DeepSpeed engine keeps between the micro-batches of an accumulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["engine_buffers", "fill_engine_buffers"]


def engine_buffers(engine: Any) -> dict[str, Any]:
    """The gradients of the micro-batches so far, as this rank has them; nothing between two steps."""
    zero = engine.optimizer
    every = engine.gradient_accumulation_steps()
    if every == 1 or engine.micro_steps % every == 0 or zero is None:
        return {}
    found: dict[str, Any] = {"accumulation": every}
    if hasattr(zero, "micro_step_id"):
        found["micro_step_id"] = zero.micro_step_id
    if hasattr(zero, "grad_partitions_flat_buffer"):  # ZeRO 3
        found["partitions"] = zero.grad_partitions_flat_buffer.detach().clone()
        return found
    if hasattr(zero, "all_grad_tensors"):  # ZeRO 1 and 2
        listed = {i: [t.detach().clone() for t in group] for i, group in zero.all_grad_tensors.items() if group}
        found["reduced"] = listed
        compact = {i: getattr(group, "flat_partition", None) for i, group in zero.averaged_gradients.items()}
        found["compact"] = {i: flat.detach().clone() for i, flat in compact.items() if isinstance(flat, Tensor)}
        on_host = getattr(zero, "accumulated_grads_in_cpu", None) or {}
        found["on_host"] = {key: value.detach().clone() for key, value in on_host.items() if isinstance(value, Tensor)}
    return found


def fill_engine_buffers(engine: Any, state: Mapping[str, Any]) -> None:
    """Take back what :func:`engine_buffers` returned, in the same layout."""
    zero = engine.optimizer
    if "accumulation" not in state:
        return
    with torch.no_grad():
        if "micro_step_id" in state:
            zero.micro_step_id = state["micro_step_id"]
        if "partitions" in state:
            zero.grad_partitions_flat_buffer.copy_(state["partitions"])
        for i, tensors in state.get("reduced", {}).items():
            zero.all_grad_tensors[i] = [tensor.clone() for tensor in tensors]
        for i, flat in state.get("compact", {}).items():
            zero._get_compact_grad_partition_buffer(i).flat_partition.copy_(flat)
        for key, value in state.get("on_host", {}).items():
            zero.accumulated_grads_in_cpu[key] = value.clone()
