"""Passes that change nothing in a module: its buffers, metrics and attributes are afterwards as they were before."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Module

__all__ = ["untouched"]

_CONTAINERS: Final = (list, dict, set)
_OF_METRICS: Final = ("_update_count", "_computed")


@contextmanager
def untouched(module: Module) -> Generator[None]:
    """While entered, a pass may run through a module: what it changes is undone, parameters and their hooks apart.

    Of every submodule that is the buffers, the public attributes, the content of lists, dicts and sets among them, and
    the states of a metric of torchmetrics.
    """
    buffers = {buffer: buffer.detach().clone() for buffer in module.buffers()}
    kept = [(each.__dict__, _attributes(each)) for each in module.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for fields, before in kept:
            for name in [name for name in fields if not name.startswith("_") and name not in before]:
                del fields[name]
            for name, (value, content) in before.items():
                _refill(value, content)
                fields[name] = value


def _attributes(module: Module) -> dict[str, tuple[Any, Any]]:
    """Attributes by name, and copies of those that could change in place."""
    states = getattr(module, "_defaults", None)
    names = {*states, *_OF_METRICS} if isinstance(states, dict) and hasattr(module, "_update_count") else set()
    found = {}
    for name, value in module.__dict__.items():
        if name in names or not name.startswith("_"):
            copied = value.detach().clone() if isinstance(value, Tensor) and name in names else None
            found[name] = value, value.copy() if type(value) in _CONTAINERS else copied
    return found


def _refill(value: Any, content: Any) -> None:
    """Give a value its content back."""
    if content is None:
        return
    if isinstance(value, Tensor):
        with torch.no_grad():
            value.copy_(content)
    elif isinstance(value, list):
        value[:] = content
    elif value != content:
        value.clear()
        value.update(content)
