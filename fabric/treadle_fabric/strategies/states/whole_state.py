"""Strategies under which every rank has the whole model and optimizer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.checkpoint import in_memory
from treadle_fabric.strategies.states.checkpointing import CheckpointingStrategy
from treadle_fabric.strategies.unwrapping import load_module_state, module_state

__all__ = ["WholeStateStrategy", "complete_state", "load_complete_state"]


class WholeStateStrategy(CheckpointingStrategy):
    """A strategy under which every rank has the whole state."""

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        return module_state(module)

    def load_module_state_dict(self, module: Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        load_module_state(module, state_dict, strict=strict)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return complete_state(optimizer)

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        load_complete_state(optimizer, in_memory(state))


def complete_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state dict of an optimizer, also where a parameter was taken out of its group and has a state."""
    try:
        return optimizer.state_dict()
    except KeyError:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        whole = optimizer.state
        optimizer.state = defaultdict(dict, {p: state for p, state in whole.items() if id(p) in held})
        try:
            return optimizer.state_dict()
        finally:
            optimizer.state = whole


def load_complete_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the state dict of an optimizer; tensors of its groups stay on their devices."""
    groups = optimizer.param_groups
    devices = [{name: v.device for name, v in group.items() if isinstance(v, Tensor)} for group in groups]
    optimizer.load_state_dict(state)
    for group, before in zip(optimizer.param_groups, devices, strict=True):
        for name, device in before.items():  # a learning rate, say; torch leaves these where the file had them
            if isinstance(value := group.get(name), Tensor):
                group[name] = value.to(device)
