"""Parameters that a module has under several names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import nn

__all__ = ["find_shared_parameters", "set_shared_parameters"]

M = TypeVar("M", bound=nn.Module)


def find_shared_parameters(module: nn.Module) -> list[list[str]]:
    """Find the parameters with several names: one list of names each, as in ``[["embed.weight", "head.weight"]]``."""
    names: dict[int, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def set_shared_parameters(module: M, shared_params: Iterable[Sequence[str]]) -> M:
    """Let all names of a group name one parameter again: the first name's.

    Moving a module to a device where tensors cannot be moved in place separates parameters that were shared.

    Args:
        module: The module, changed in place.
        shared_params: Groups of names, as :func:`find_shared_parameters` returned them before the move.

    Returns:
        ``module``.
    """
    for first, *others in shared_params:
        param = module.get_parameter(first)
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, param)
    return module
