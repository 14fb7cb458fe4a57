"""Modules whose parameters have no values yet."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.strategies.parts import NoInit

__all__ = ["empty_init", "has_meta_tensors", "materialize_all", "materialize_one"]


def empty_init(enabled: bool = True) -> AbstractContextManager[Any]:
    """A context in which modules get memory, and no values: ``torch.nn.init`` does nothing."""
    return NoInit() if enabled else nullcontext()


def has_meta_tensors(obj: Module | Optimizer, recurse: bool = True) -> bool:
    """Whether a tensor of a module, or a parameter of an optimizer, is on the meta device."""
    if isinstance(obj, Optimizer):
        return any(p.is_meta for group in obj.param_groups for p in group["params"])
    return any(tensor.is_meta for tensor in chain(obj.parameters(recurse), obj.buffers(recurse)))


def materialize_one(module: Module, device: torch.device | str | int) -> None:
    """Give the tensors of a module itself, without its children, memory on a device and first values."""
    reset = getattr(module, "reset_parameters", None)
    if not callable(reset):
        raise MisconfigurationException(
            f"{type(module).__name__} was made on the meta device and has no method `reset_parameters`, which would"
            " give its parameters values: define the method, or make the module on the device."
        )
    module.to_empty(device=device, recurse=False)
    reset()


def materialize_all(module: Module, device: torch.device | str | int) -> None:
    """Give all tensors of a module that are on the meta device memory on a device, and first values."""
    for each in module.modules():
        if has_meta_tensors(each, recurse=False):
            materialize_one(each, device)
