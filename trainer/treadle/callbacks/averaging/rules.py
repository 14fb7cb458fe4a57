"""The rules of averages, as objects that can be sent to other processes; torch's own are functions in functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

__all__ = ["Exponential", "OneByOne", "equal"]


def equal(averages: Any, weights: Any, count: Tensor) -> None:
    """Update averages in which all weights count the same."""
    get_swa_multi_avg_fn()(averages, weights, int(count))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Exponential:
    """Updates averages of which an update leaves ``decay``."""

    decay: float

    def __call__(self, averages: Any, weights: Any, count: Tensor) -> None:
        get_ema_multi_avg_fn(self.decay)(averages, weights, count)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class OneByOne:
    """Updates averages one after the other, by a function that returns the new one."""

    avg_fn: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, averages: Any, weights: Any, count: Tensor) -> None:
        for average, weight in zip(averages, weights, strict=True):
            average.copy_(self.avg_fn(average, weight, count))
