"""Types that several layers share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

__all__ = ["LRScheduler", "PathLike", "Stateful"]

PathLike: TypeAlias = str | os.PathLike[str] | Path


@runtime_checkable
class Stateful(Protocol):
    """Any object whose state a checkpoint can keep."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@runtime_checkable
class LRScheduler(Protocol):
    """What the trainer needs of a learning-rate scheduler; every torch scheduler has it."""

    optimizer: torch.optim.Optimizer

    def step(self, *args: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...
