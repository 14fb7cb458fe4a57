"""Masks of pruned parameters: put on, taken off, saved and restored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from treadle.callbacks.pruning.methods import Pairs, parameter_of
from treadle_fabric import plain_name

__all__ = ["captured", "is_pruned", "made_permanent", "mask_of", "names_of", "put_on", "refresh", "take_off"]


def is_pruned(module: nn.Module, name: str) -> bool:
    """Whether a parameter has a mask."""
    return f"{name}_mask" in module._buffers


def mask_of(module: nn.Module, name: str) -> Tensor | None:
    """The mask of a parameter: 1 for each entry that is kept, 0 for each that is pruned; None without a mask."""
    return module._buffers.get(f"{name}_mask")


def names_of(module: nn.Module, pairs: Pairs) -> list[str]:
    """The plain names of parameters in a module, as they are without masks."""
    paths: dict[int, str] = {id(m): path for path, m in module.named_modules()}
    return [plain_name(module, ".".join(filter(None, (paths[id(m)], name)))) for m, name in pairs]


def refresh(module: nn.Module, name: str) -> None:
    """Compute the pruned parameter from its entries and its mask, as each forward pass does."""
    original, mask = parameter_of(module, name), mask_of(module, name)
    if original is not None and mask is not None:
        setattr(module, name, mask.to(original.dtype) * original)


@torch.no_grad()
def captured(module: nn.Module, pairs: Pairs) -> dict[str, Any]:
    """What a checkpoint keeps of masks.

    Returns:
        ``masks``: for each pruned parameter, True where an entry is kept. ``pruned``: the values of the other entries,
        which have no effect, but which the optimizer may go on changing. The kept ones are the module's weights.
    """
    state: dict[str, Any] = {"masks": {}, "pruned": {}}
    for full, (owner, name) in zip(names_of(module, pairs), pairs, strict=True):
        original, mask = parameter_of(owner, name), mask_of(owner, name)
        if original is not None and mask is not None:
            kept = mask.bool()
            state["masks"][full], state["pruned"][full] = kept, original.detach()[~kept]
    return state


@torch.no_grad()
def put_on(module: nn.Module, pairs: Pairs, state: Mapping[str, Any]) -> None:
    """Put masks on parameters whose pruned entries are 0; see :func:`captured`."""
    for full, (owner, name) in zip(names_of(module, pairs), pairs, strict=True):
        parameter = parameter_of(owner, name)
        if full not in state["masks"] or parameter is None or is_pruned(owner, name):
            continue
        kept = state["masks"][full].to(parameter.device)
        prune.custom_from_mask(owner, name, kept.to(parameter.dtype))  # type: ignore[no-untyped-call]
        parameter[~kept] = state["pruned"][full].to(parameter)


def take_off(pairs: Pairs) -> None:
    """Make what is pruned 0 for good, and remove masks: parameters have their own names again."""
    for owner, name in pairs:
        if is_pruned(owner, name):
            prune.remove(owner, name)  # type: ignore[no-untyped-call]


def made_permanent(module: nn.Module, pairs: Pairs, state: Mapping[str, Any]) -> Any:
    """The state dict that a module would have after :func:`take_off`.

    Args:
        module: The module.
        pairs: What may be pruned in it.
        state: Its state dict now, under plain names.
    """
    pruned = {(id(owner), name) for owner, name in pairs if is_pruned(owner, name)}
    plain: Any = copy.copy(state)
    for path, owner in module.named_modules(remove_duplicate=False):
        for buffer in owner._buffers:
            name = buffer.removesuffix("_mask")
            full = plain_name(module, ".".join(filter(None, (path, name))))
            if (id(owner), name) in pruned and f"{full}_orig" in plain and f"{full}_mask" in plain:
                original, mask = plain.pop(f"{full}_orig"), plain.pop(f"{full}_mask")
                plain[full] = mask.to(original.dtype) * original
    return plain
