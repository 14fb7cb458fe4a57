"""Layouts to compare for a model and a number of devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from treadle_fabric.errors import MisconfigurationException, near_names
from treadle_fabric.strategies import STRATEGY_REGISTRY, Strategy

__all__ = ["Layout", "layouts"]

_PLAN = "tensor_parallel_plan"
"""The attribute of a model with the plan by which its layers are shared out."""


@dataclass(frozen=True)
class Layout:
    """A strategy for a number of ranks."""

    name: str
    """What the user calls it."""
    about: str
    """In a few words."""
    make: Callable[[], str | Strategy]
    """Makes the strategy."""
    ranks: int | None = None
    """The number of ranks. Default: all devices."""


def _fsdp(**arguments: Any) -> Callable[[], Strategy]:
    def make() -> Strategy:
        from treadle_fabric.strategies import FSDPStrategy  # heavy

        return FSDPStrategy(**arguments)

    return make


def _tensor(size: int, plan: Any) -> Callable[[], Strategy]:
    def make() -> Strategy:
        from treadle_fabric.strategies import ModelParallelStrategy  # heavy

        return ModelParallelStrategy(tensor_parallel_size=size, tensor_parallel_plan=plan)

    return make


def _named(name: str) -> Callable[[], str]:
    return lambda: name


_KNOWN: Final = (
    Layout("single_device", "one device", _named("single_device"), 1),
    Layout("ddp", "the whole model on each rank", _named("ddp")),
    Layout("fsdp_grad_op", "gradients and optimizer shared out", _fsdp(sharding_strategy="SHARD_GRAD_OP")),
    Layout("fsdp", "all shared out", _named("fsdp")),
    Layout("fsdp_recompute", "and activations computed again", _fsdp(activation_checkpointing=True)),
    Layout("fsdp_offload", "and kept on the host", _fsdp(cpu_offload=True)),
    Layout("hybrid", "shared out in each machine", _fsdp(sharding_strategy="HYBRID_SHARD")),
)
_DEEPSPEED: Final = (
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_2_offload",
    "deepspeed_stage_3",
    "deepspeed_stage_3_offload",
)


def layouts(model: Any, devices: int, num_nodes: int, names: Sequence[str] | None = None) -> list[Layout]:
    """Say which layouts to compare.

    Args:
        model: The model, or its class; with an attribute ``tensor_parallel_plan``, tensor parallelism is among them.
        devices: The number of devices on all machines.
        num_nodes: The number of machines.
        names: The layouts that the user asks for, or names of strategies. Default: those that can be told apart here.

    Raises:
        MisconfigurationException: A name is unknown.
    """
    known = {each.name: each for each in _KNOWN}
    plan = getattr(model, _PLAN, None)
    per_node = devices // num_nodes
    for size in (2, 4, 8):
        if plan is not None and per_node % size == 0 and devices >= size:
            known[f"tensor_{size}"] = Layout(f"tensor_{size}", f"{size} ranks share layers", _tensor(size, plan))
    for name in _DEEPSPEED:
        known[name] = Layout(name, "by ZeRO's arithmetic", _named(name))
    if names is None:
        left_out = {"hybrid"} if num_nodes == 1 else set()
        if devices == 1:
            left_out |= {name for name, each in known.items() if each.ranks is None}
        return [each for name, each in known.items() if name not in left_out]
    chosen = []
    for name in names:
        if name not in known and name not in STRATEGY_REGISTRY:
            every = [*known, *STRATEGY_REGISTRY.available_strategies()]
            extra = f" {type(model).__name__} has no attribute {_PLAN}." if name.startswith("tensor_") else ""
            raise MisconfigurationException(f"layout {name!r} is unknown.{extra} {near_names(name, every)}")
        chosen.append(known.get(name) or Layout(name, "", _named(name)))
    return chosen
