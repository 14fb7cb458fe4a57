"""Types of arguments, where users of Lightning Fabric look for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import UntypedStorage
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.distributed_c10d import ReduceOp as _Op

from treadle_fabric.types import CollectibleGroup, LRScheduler, Optimizable, PathLike, Stateful, Steppable

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
