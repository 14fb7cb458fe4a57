"""The training flags of a module's parts, kept while all are in evaluation mode; where a module without parts is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module

__all__ = ["as_moved", "module_modes", "restore_modes"]


def module_modes(module: Module) -> list[tuple[Module, bool]]:
    """Every submodule with its training flag."""
    return [(m, m.training) for m in module.modules()]


def restore_modes(modes: list[tuple[Module, bool]]) -> None:
    """Give submodules back the flags of :func:`module_modes`."""
    for module, mode in modes:
        own = module.__dict__
        if "training" in own:
            own["training"] = mode  # past nn.Module.__setattr__, which is slow
        else:
            module.training = mode  # a scripted module keeps the flag in C++


def as_moved(move: Callable[[Tensor], Tensor], before: Tensor | None) -> Tensor:
    """What a module without parameters has in their place: an empty tensor, moved and converted as they would be.

    Args:
        move: What ``Module.to`` and its like do with each parameter.
        before: The empty tensor so far. Default: one on the CPU, of torch's default dtype.
    """
    if before is None:
        return move(torch.empty(0)).detach()
    try:
        return move(before).detach()
    except NotImplementedError:  # from the meta device to a real one
        return move(torch.empty(0, dtype=before.dtype)).detach()
