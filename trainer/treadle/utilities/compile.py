"""Modules of ``torch.compile``, where users of a trainer look for what unwraps them."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from treadle_fabric import MisconfigurationException, uncompiled

__all__ = ["from_compiled", "to_uncompiled"]


def from_compiled(model: Module) -> Any:
    """Return the LightningModule that ``torch.compile`` was given.

    The Trainer takes what ``torch.compile`` returned, and runs it compiled; the module that this function returns runs
    without.

    Raises:
        MisconfigurationException: ``model`` is not compiled.
    """
    if (module := uncompiled(model)) is model:
        raise MisconfigurationException(f"{type(model).__name__} is not compiled: pass what `torch.compile` returned.")
    return module


def to_uncompiled(model: Module) -> Any:
    """Return a module as it was before ``torch.compile``.

    Raises:
        MisconfigurationException: ``model`` is not compiled.
    """
    return from_compiled(model)


def _maybe_unwrap_optimized(model: Any) -> Any:
    """Return a module as it was before ``torch.compile``, if it was compiled."""
    return uncompiled(model)
