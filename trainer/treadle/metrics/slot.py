"""A slot: the values logged under one name, until they are reduced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from treadle.metrics.options import LogOptions
from treadle.metrics.reduction import Reduction, reduction_named
from treadle.metrics.values import flatten_metrics, is_at_hand, scalar_on, vector_on

__all__ = ["Slot"]
_ON_TENSORS: Final[dict[str, Callable[[Tensor], Tensor]]] = {"sum": torch.sum, "min": torch.amin, "max": torch.amax}
_ON_NUMBERS: Final[dict[str, Callable[[list[Any]], Any]]] = {"sum": sum, "min": min, "max": max}
_FOLD_EVERY: Final = 256  # pending values are summed in one operation, this many at a time


class Slot:
    """One logged name in one hook (and loader): its latest value, and what its epoch value is made of."""

    __slots__ = (
        "closed", "forked", "fresh", "has_value", "loader", "logger", "metric", "name", "on_epoch", "on_step",
        "options", "pending", "prog_bar", "rank_zero_only", "reduce", "suffix", "total", "value", "values",
        "weight", "weights",
    )  # fmt: skip

    def __init__(self, name: str, options: LogOptions, on_step: bool, on_epoch: bool) -> None:
        self.name, self.suffix = name, ""
        self.options = options
        self.on_step, self.on_epoch, self.forked = on_step, on_epoch, on_step and on_epoch
        self.prog_bar, self.logger = options.prog_bar, options.logger is not False
        self.reduce: Reduction | Callable[[Tensor], Any] = reduction_named(options.reduce_fx) or options.reduce_fx  # type: ignore[assignment]
        self.rank_zero_only = options.rank_zero_only
        self.metric: Any = None
        self.loader: int | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the values of the epoch."""
        self.value: Any = None
        self.has_value = self.fresh = self.closed = False
        self.pending: list[Any] = []
        self.weights: list[float] = []
        self.values: list[Any] = []  # all of them, for a callable reduction
        self.total: Any = None
        self.weight = 0.0

    def entries(self, value: Any, fork: str = "") -> list[tuple[str, Any]]:
        """Return a value with the names it is logged under; ``fork`` is added where step and epoch values both are."""
        end = (fork if self.forked else "") + self.suffix
        if isinstance(value, Mapping):  # a torchmetrics object may compute several
            return [(name + end, scalar) for name, scalar in flatten_metrics(value, f"{self.name}/")]
        return [(self.name + end, value)]

    def accumulate(self, value: Any, weight: float) -> None:
        """Add a value to the epoch's reduction."""
        if not weight and self.reduce == "mean":
            return  # a value of no samples counts for nothing, and may be NaN
        self.pending.append(value)
        self.weights.append(weight)
        if len(self.pending) >= _FOLD_EVERY:
            self.fold()

    def fold(self) -> None:
        """Reduce the pending values in one operation, without waiting for the device."""
        if not self.pending:
            return
        values, weights = self.pending, self.weights
        self.pending, self.weights = [], []
        if callable(self.reduce):
            self.values += values
            return
        among = any(isinstance(v, Tensor) for v in values)
        part = self._of_tensors(values, weights) if among else self._of_numbers(values, weights)
        if self.total is None:
            self.total = part
        elif self.reduce in ("min", "max"):
            pair = stack([self.total, part])
            self.total = _ON_TENSORS[self.reduce](pair)
        else:
            self.total = self.total + part
        self.weight += sum(weights)

    def _of_numbers(self, values: list[Any], weights: list[float]) -> Any:
        if self.reduce == "mean":
            return sum(v * w for v, w in zip(values, weights, strict=True))
        return _ON_NUMBERS[self.reduce](values)  # type: ignore[index]

    def _of_tensors(self, values: list[Any], weights: list[float]) -> Tensor:
        """Reduce values among which are tensors; the result is a tensor, whichever kind of value came last."""
        if self.reduce in ("mean", "sum") and all(map(is_at_hand, values)):
            numbers = [v.item() if isinstance(v, Tensor) else v for v in values]
            return torch.tensor(float(self._of_numbers(numbers, weights)), dtype=torch.float64, device="cpu")
        stacked = stack(values)
        if self.reduce == "mean":
            alike = weights.count(weights[0]) == len(weights)  # several weights would have to be sent to the device
            return stacked.sum() * weights[0] if alike else stacked @ vector_on(weights, stacked.dtype, stacked.device)
        return _ON_TENSORS[self.reduce](stacked)  # type: ignore[index]

    def compute(self) -> Any:
        """Return the epoch's value on this rank."""
        if self.metric is not None:
            return self.metric.compute()
        self.fold()
        if callable(self.reduce):
            return self.reduce(stack(self.values))
        if self.total is None:  # a mean over no samples
            return float("nan")
        return self.total / self.weight if self.reduce == "mean" else self.total


def stack(values: list[Any]) -> Tensor:
    """Stack scalars of any kind into one vector, in double precision where the device has it."""
    device = next((v.device for v in values if isinstance(v, Tensor) and v.device.type != "cpu"), torch.device("cpu"))
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if all(isinstance(v, Tensor) and v.device == device and v.dtype == values[0].dtype for v in values):
        return torch.stack([v.reshape(()) for v in values]).to(dtype)
    return torch.stack([scalar_on(v, dtype, device) for v in values])
