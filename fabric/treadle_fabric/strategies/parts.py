"""What a strategy is put together from, and names that it has in common with those who call it."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from treadle_fabric.accelerators import Accelerator
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.precision import Precision

__all__ = [
    "METHOD_KEYWORD",
    "NoInit",
    "Parts",
    "Plugin",
    "elements_here",
    "elements_of",
    "is_part",
    "note_groups",
    "own_groups",
    "whole_shape",
]

METHOD_KEYWORD = "treadle_method"
"""Under a strategy that ``requires_forward_redirect``, the engine's forward takes this keyword: a method of the user's
module to run instead of the module's ``forward``."""


Plugin: TypeAlias = Precision | CheckpointIO | ClusterEnvironment
"""What ``plugins`` takes, one object of each."""


@dataclass(frozen=True)
class Parts:
    """What a strategy is put together from, as far as it is known."""

    accelerator: Accelerator | None = None
    devices: tuple[torch.device, ...] = ()
    precision: Precision | None = None
    checkpoint_io: CheckpointIO | None = None
    environment: ClusterEnvironment | None = None


class NoInit(TorchFunctionMode):
    """Turns the functions of ``torch.nn.init`` into no-ops."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


_groups: MutableMapping[Optimizer, list[list[Parameter]]] = WeakKeyDictionary()


def note_groups(optimizer: Optimizer, groups: Sequence[Sequence[Parameter]]) -> None:
    """Keep the user's own parameters of an optimizer whose groups an engine has filled with other tensors.

    Args:
        optimizer: The optimizer.
        groups: The parameters of each group.
    """
    _groups[optimizer] = [list(group) for group in groups]


def own_groups(optimizer: Optimizer) -> list[list[Parameter]]:
    """The user's own parameters in each group of an optimizer, also where an engine has put others in their place."""
    found = _groups.get(optimizer)
    return [list(group["params"]) for group in optimizer.param_groups] if found is None else found


def elements_of(parameter: Any) -> int:
    """The elements of a whole parameter, also where an engine has left this rank a part of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def elements_here(parameter: Any) -> int:
    """The elements that this rank holds of a parameter, padding included."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None and hasattr(parameter, "to_local"):
        part = parameter.to_local()
    return int((parameter if part is None else part).numel())


def is_part(parameter: Any) -> bool:
    """Whether a parameter is what XLA's FSDP has left this process of it."""
    return hasattr(parameter, "_orig_size")


def whole_shape(parameter: Any) -> torch.Size:
    """The shape of the whole of a parameter that :func:`is_part`."""
    shape: torch.Size = parameter._orig_size
    return shape
