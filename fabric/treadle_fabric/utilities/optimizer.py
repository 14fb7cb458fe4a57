"""The state of optimizers on a device, where users of Lightning Fabric look for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from treadle_fabric.batches import map_tensors, move_data_to_device

__all__ = ["_optimizer_to_device", "_optimizers_to_device"]


def _optimizers_to_device(optimizers: Iterable[Optimizer], device: torch.device | str | int) -> None:
    """Move the state of several optimizers to a device, in place."""
    for optimizer in optimizers:
        _optimizer_to_device(optimizer, device)


def _optimizer_to_device(optimizer: Optimizer, device: torch.device | str | int) -> None:
    """Move the state of an optimizer to a device, in place; counts of steps stay on the CPU, as torch has them."""

    def moved(name: str, value: Any) -> Any:
        if name == "step":
            return value
        return (
            move_data_to_device(value, device)
            if isinstance(value, Tensor)
            else map_tensors(value, lambda tensor: tensor.to(device))
        )

    for parameter, state in optimizer.state.items():
        optimizer.state[parameter] = {name: moved(name, value) for name, value in state.items()}
