"""The training flags of a module's parts, kept while all are in evaluation mode."""

from __future__ import annotations

from torch.nn import Module

__all__ = ["module_modes", "restore_modes"]


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
