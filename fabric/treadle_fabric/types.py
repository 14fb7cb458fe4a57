"""Types that several layers share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

__all__ = ["CollectibleGroup", "LRScheduler", "Optimizable", "PathLike", "Stateful", "Steppable"]

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
