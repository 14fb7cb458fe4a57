"""Types of arguments, where users of Lightning Fabric look for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import UntypedStorage
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.distributed_c10d import ReduceOp as _Op

from treadle_fabric.types import LRScheduler, PathLike, Stateful

__all__ = [
    "CollectibleGroup",
    "LRScheduler",
    "Optimizable",
    "PathLike",
    "ProcessGroup",
    "RedOpType",
    "ReduceOp",
    "Stateful",
    "Steppable",
]

_PATH: TypeAlias = str | Path
_DEVICE: TypeAlias = torch.device | str | int
_MAP_LOCATION_TYPE: TypeAlias = (
    _DEVICE | Callable[[UntypedStorage, str], UntypedStorage | None] | dict[_DEVICE, _DEVICE] | None
)
_PARAMETERS: TypeAlias = Iterator[torch.nn.Parameter]
_Stateful = Stateful
RedOpType: Any = _Op.RedOpType


@runtime_checkable
class CollectibleGroup(Protocol):
    """A group of processes with collectives."""

    def size(self) -> int: ...

    def rank(self) -> int: ...


@runtime_checkable
class Steppable(Protocol):
    """Whatever has a step, as optimizers do."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any: ...


@runtime_checkable
class Optimizable(Steppable, Protocol):
    """What is needed of an optimizer."""

    param_groups: list[dict[Any, Any]]
    defaults: dict[Any, Any]
    state: Any

    def state_dict(self) -> dict[str, dict[Any, Any]]: ...

    def load_state_dict(self, state_dict: dict[str, dict[Any, Any]]) -> None: ...
