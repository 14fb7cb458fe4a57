"""What a DeepSpeed engine keeps between the micro-batches of an accumulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["engine_buffers", "fill_engine_buffers"]

_PASSES: Final = "_unmanaged_backward_count"
"""The attribute of an engine in which it counts the backward passes since its last step."""


def engine_buffers(engine: Any) -> dict[str, Any]:
    """The gradients of the micro-batches so far, as this rank has them; nothing between two steps."""
    zero = engine.optimizer
    passes = getattr(engine, _PASSES, 0)
    every = engine.gradient_accumulation_steps()
    if zero is None or (not passes and engine.micro_steps % every == 0):
        return {}
    found: dict[str, Any] = {"passes": passes}
    if hasattr(zero, "micro_step_id"):
        found["micro_step_id"] = zero.micro_step_id
    if hasattr(zero, "grad_partitions_flat_buffer"):  # ZeRO 3
        # the next pass counts the one before
        found["micro_step_id"] += int(bool(getattr(zero, "_epilogue_ran_this_backward", False)))
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
    if "passes" not in state:
        return
    setattr(engine, _PASSES, state["passes"])
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
