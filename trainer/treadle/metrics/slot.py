"""A slot: the values logged under one name, until they are reduced."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from treadle.metrics.options import LogOptions
from treadle.metrics.reduction import Kind, Reduction, reduction_named
from treadle.metrics.values import flatten_metrics, is_at_hand, scalar_on, vector_on

__all__ = ["Slot"]
_ON_TENSORS: Final[dict[str, Callable[[Tensor], Tensor]]] = {"sum": torch.sum, "min": torch.amin, "max": torch.amax}
_ON_NUMBERS: Final[dict[str, Callable[[list[Any]], Any]]] = {"sum": sum, "min": min, "max": max}
_FOLD_EVERY: Final = 256  # pending values are summed in one operation, this many at a time


class Slot:
    """One logged name in one hook (and loader): its latest value, and what its epoch value is made of."""

    __slots__ = (
        "closed", "dtype", "forked", "fresh", "has_value", "loader", "logger", "metric", "name", "on_epoch", "on_step",
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
        self.dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        """Of the epoch's value: 16 bits would lose digits, and their sums overflow."""
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
        """Reduce the pending values, without waiting for the device."""
        if not self.pending:
            return
        values, weights = self.pending, self.weights
        self.pending, self.weights = [], []
        dtypes = {v.dtype for v in values if isinstance(v, Tensor)}
        if torch.float64 in dtypes:
            self.dtype = torch.float64
        if callable(self.reduce):
            self.values += values
            return
        if self.reduce in ("min", "max"):
            self._keep_extreme(_ON_TENSORS[self.reduce](stack(values)) if dtypes else _ON_NUMBERS[self.reduce](values))
        elif all(map(is_at_hand, [*values, self.total])):
            self._add_up(values, weights if self.reduce == "mean" else None)
        else:
            self._add_stacked(values, weights)
        self.weight += sum(weights)

    def _keep_extreme(self, part: Any) -> None:
        self.total = part if self.total is None else _ON_TENSORS[self.reduce](stack([self.total, part]))  # type: ignore[index]

    def _add_up(self, values: list[Any], weights: list[float] | None) -> None:
        """Add values of the host to the total.

        A sum of Python numbers, and of whole numbers of any kind, is exact, or rounded as Python rounds. Other sums,
        and all means, are rounded to single precision after each value, as Lightning's are: their last digits depend on
        the order of the values, and a sum of ones ends at 2**24. Where that matters, log tensors of double precision.

        Single precision is rounded by hand: the sum of two of its numbers in double precision, rounded once more, is
        the sum that single precision has.
        """
        numbers = [v.item() if isinstance(v, Tensor) else v for v in values]
        exact = all(isinstance(n, int) or not isinstance(v, Tensor) for n, v in zip(numbers, values))
        if weights is None and exact and not isinstance(self.total, Tensor):
            self.total = (0 if self.total is None else self.total) + sum(numbers)
            return
        rounded = ctypes.c_float if self.dtype == torch.float32 else ctypes.c_double
        if not all(isinstance(v, Tensor) and v.is_floating_point() for v in values):
            numbers = [rounded(number).value for number in numbers]
        if weights is not None:
            numbers = [rounded(number * weight).value for number, weight in zip(numbers, weights)]
        total = 0.0 if self.total is None else float(self.total)
        for number in numbers:
            total = rounded(total + number).value
        self.total = torch.tensor(total, dtype=self.dtype, device="cpu")

    def _add_stacked(self, values: list[Any], weights: list[float]) -> None:
        """Add values of a device to the total in a few operations, in double precision where the device has it."""
        stacked = stack(values)
        if self.reduce != "mean":
            part = stacked.sum()
        elif weights.count(weights[0]) == len(weights):  # several weights would have to be sent to the device
            part = stacked.sum() * weights[0]
        else:
            part = stacked @ vector_on(weights, stacked.dtype, stacked.device)
        self.total = part if self.total is None else self.total + part

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

    @property
    def kind(self) -> Kind:
        """What the values so far make of the epoch's value on this rank."""
        total = self.values if callable(self.reduce) else self.total
        if total is None or total == []:
            return Kind.NOTHING
        if isinstance(total, int | float):
            return Kind.NUMBER
        return Kind.DOUBLE if self.dtype == torch.float64 else Kind.SINGLE

    @property
    def sum(self) -> Any:
        """The total so far, of what is folded, in the dtype of the epoch's value; 0 where there is none."""
        total: Any = 0.0 if self.total is None else self.total
        return total.to(self.dtype) if isinstance(total, Tensor) and self.reduce in ("mean", "sum") else total


def stack(values: list[Any]) -> Tensor:
    """Stack scalars of any kind into one vector, in double precision where the device has it."""
    device = next((v.device for v in values if isinstance(v, Tensor) and v.device.type != "cpu"), torch.device("cpu"))
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if all(isinstance(v, Tensor) and v.device == device and v.dtype == values[0].dtype for v in values):
        return torch.stack([v.reshape(()) for v in values]).to(dtype)
    return torch.stack([scalar_on(v, dtype, device) for v in values])
