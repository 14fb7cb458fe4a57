"""The learning-rate range test: train a few batches with ever larger rates, and look where the loss falls fastest.

L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2017; the smoothing of the losses is fast.ai's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from treadle.module import LightningModule
from treadle.searches.attributes import Attribute, find_attribute
from treadle.searches.status import StatusLine
from treadle.searches.trials import Trials
from treadle_fabric import (
    MisconfigurationException,
    check_integer,
    is_number,
    near_names,
    rank_zero_info,
    rank_zero_warn,
)

__all__ = ["LRFinder", "LRSearch", "go_on_with", "set_learning_rate"]

_SMOOTHING: Final = 0.98
_WARM_UP: Final = 10  # points that are means over so few losses that they tell nothing
_MODES: Final = ("exponential", "linear")


class LRFinder:
    """The results of a learning-rate range test.

    Args:
        mode: "exponential" or "linear": how the rates were spaced.
        lr_min: The first rate.
        lr_max: The last rate.
        num_training: The number of rates to test.

    Attributes:
        results: ``"lr"``: the rates that were tested, one an optimizer step; ``"loss"``: the smoothed loss at each.

    Example::

        finder = Tuner(trainer).lr_find(model)
        finder.plot(suggest=True, show=True)
        model.lr = finder.suggestion()
    """

    def __init__(self, mode: str, lr_min: float, lr_max: float, num_training: int) -> None:
        self.mode, self.lr_min, self.lr_max, self.num_training = mode, lr_min, lr_max, num_training
        self.results: dict[str, list[float]] = {"lr": [], "loss": []}
        self._optimal_idx: int | None = None

    def rate(self, index: int) -> float:
        """The rate to test at a step, from ``lr_min`` to ``lr_max``: evenly spaced, or evenly in the logarithm."""
        part = index / max(self.num_training - 1, 1)
        if part == 1.0:
            return self.lr_max
        if self.mode == "linear":
            return self.lr_min + part * (self.lr_max - self.lr_min)
        return float(self.lr_min * (self.lr_max / self.lr_min) ** part)

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """Return the rate at which the loss falls fastest, as seen on the axis of the plot.

        Args:
            skip_begin: The number of points to leave out at the beginning, where the mean is over few losses.
            skip_end: The number of points to leave out at the end, where the loss may have begun to explode.

        Returns:
            The rate; None where fewer than two points are left.
        """
        skip_begin = check_integer("suggestion: skip_begin", skip_begin, minimum=0)
        skip_end = check_integer("suggestion: skip_end", skip_end, minimum=0)
        rates, losses = self.results["lr"], self.results["loss"]
        kept = [i for i in range(skip_begin, len(losses) - skip_end) if math.isfinite(losses[i])]
        if len(kept) < 2:
            rank_zero_info(
                f"The range test has {len(losses)} points, of which {len(kept)} are left without the first {skip_begin}"
                f" and the last {skip_end}: too few for a suggestion. Raise num_training or early_stop_threshold, or"
                " lower skip_begin or max_lr."
            )
            self._optimal_idx = None
            return None
        axis = [rates[i] if self.mode == "linear" else math.log10(rates[i]) for i in kept]
        points = torch.tensor([losses[i] for i in kept], dtype=torch.float64)
        (slopes,) = torch.gradient(points, spacing=(torch.tensor(axis, dtype=torch.float64),))
        self._optimal_idx = kept[int(slopes.argmin())]
        return rates[self._optimal_idx]

    def plot(self, suggest: bool = False, show: bool = False, ax: Any = None) -> Any:
        """Draw the loss against the learning rate.

        Args:
            suggest: Mark the suggested rate.
            show: Show the figure in a window or a notebook.
            ax: A matplotlib ``Axes`` to draw on. Default: a new figure.

        Returns:
            The figure.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        from treadle.searches.plot import plot_range_test  # matplotlib is heavy, and an extra

        suggested = self.suggestion() if suggest else None
        return plot_range_test(self.results, self.mode, suggested, show=show, ax=ax)


@dataclass(frozen=True)
class LRSearch:
    """A learning-rate range test, and what it is to set.

    Args:
        min_lr: The smallest rate to test.
        max_lr: The largest.
        num_training: The number of rates to test.
        mode: "exponential" or "linear": the spacing of the rates.
        early_stop_threshold: The test ends where the smoothed loss is this many times the smallest one so far, but not
            in the first 10 points; or where a loss is not finite. None: it never ends early.
        update_attr: Whether the module gets the suggested rate.
        attr_name: The attribute or hyper-parameter with the learning rate. Default: "lr" or "learning_rate".

    Raises:
        MisconfigurationException: an argument is wrong.
    """

    min_lr: float = 1e-8
    max_lr: float = 1
    num_training: int = 100
    mode: str = "exponential"
    early_stop_threshold: float | None = 4.0
    update_attr: bool = True
    attr_name: str = ""

    NAMES: ClassVar[tuple[str, ...]] = ("lr", "learning_rate")

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise MisconfigurationException(
                f"lr_find: mode={self.mode!r} must be 'exponential' or 'linear'. {near_names(str(self.mode), _MODES)}"
            )
        for name in ("min_lr", "max_lr"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < math.inf:
                raise MisconfigurationException(f"lr_find: {name}={value!r} must be a number above 0.")
        if self.min_lr >= self.max_lr:
            raise MisconfigurationException(
                f"lr_find: min_lr={self.min_lr} must be smaller than max_lr={self.max_lr}: raise max_lr."
            )
        check_integer("lr_find: num_training", self.num_training, minimum=1)
        threshold = self.early_stop_threshold
        if threshold is not None and not (is_number(threshold) and threshold > 1):
            raise MisconfigurationException(
                f"lr_find: early_stop_threshold={threshold!r} must be a number above 1, or None to test all rates."
            )

    def attribute(self, module: LightningModule) -> Attribute | None:
        """Find what the search is to set; None where it is to set nothing.

        Raises:
            MisconfigurationException: the module has no such attribute.
        """
        if not self.update_attr:
            return None
        names = (self.attr_name,) if self.attr_name else self.NAMES
        remedy = "set it in `__init__` and use it in `configure_optimizers`; or name another one with `attr_name`;"
        return find_attribute(names, [module], f"{remedy} or pass update_attr=False.")

    def run(self, trials: Trials) -> LRFinder:
        """Run the test; see :class:`Trials`.

        Raises:
            MisconfigurationException: there is not exactly one optimizer, or no loss.
        """
        optimizers, attribute = trials.optimizers, self.attribute(trials.module)
        if len(optimizers) != 1:
            raise MisconfigurationException(
                f"lr_find tests the learning rate of one optimizer, and `configure_optimizers` of"
                f" {type(trials.module).__qualname__} returned {len(optimizers)}: return one, or choose the rates by"
                " hand."
            )
        if attribute is not None:
            self._tell_if_unused(trials, attribute)
        test = _RangeTest(self, trials, optimizers[0])
        try:
            trials.train(test.before, test.after)
        finally:
            test.status.clear()
        return test.finder

    def apply(self, finder: LRFinder, module: LightningModule) -> float | None:
        """Set the suggested rate, and tell the user; returns the rate that was set, or None."""
        attribute, count = self.attribute(module), len(finder.results["lr"])
        tested = (
            f"lr_find: tested {count} of {self.num_training} learning rates from {self.min_lr:g} to {self.max_lr:g}"
        )
        suggested = finder.suggestion()
        if attribute is None or suggested is None:
            kept = "" if attribute is None else f"; {attribute.where} stays {attribute.get():.3g}"
            rank_zero_info(
                f"{tested}; {'no suggestion' if suggested is None else f'suggestion: {suggested:.3g}'}{kept}."
            )
            return None
        attribute.set(suggested)
        rank_zero_info(f"{tested}; set {attribute.where} to {suggested:.3g}.")
        return suggested

    def _tell_if_unused(self, trials: Trials, attribute: Attribute) -> None:
        """Warn where ``configure_optimizers`` makes the same of two values of the attribute."""
        before, made = attribute.get(), []
        probe = math.sqrt(self.min_lr * self.max_lr)
        try:
            with suppress(Exception):  # what it raises for values that are not the user's says nothing
                for value in (probe, probe / 2):
                    attribute.set(value)
                    made.append([_numbers(group) for group in trials.configured_groups()])
        finally:
            attribute.set(before)
        if len(made) == 2 and made[0] == made[1]:
            rank_zero_warn(
                f"lr_find sets {attribute.where}, but `configure_optimizers` makes the same optimizer whatever its"
                f" value is: use it there (`lr=self.{attribute.name}`), name the attribute that is used with"
                " `attr_name`, or pass update_attr=False."
            )


class _RangeTest:
    """One test under way: sets the rate before each optimizer step, and notes the loss after it."""

    def __init__(self, search: LRSearch, trials: Trials, optimizer: Optimizer) -> None:
        self.finder = LRFinder(search.mode, search.min_lr, search.max_lr, search.num_training)
        self.status = StatusLine(trials.shows_progress)
        self._search, self._trials, self._optimizer = search, trials, optimizer
        self._total: Tensor | None = None  # of the accumulation so far
        self._average, self._averaged, self._best = 0.0, 0, math.inf
        self._idle = 0

    def before(self) -> None:
        """A batch follows."""
        set_learning_rate(self._optimizer, self.finder.rate(len(self.finder.results["lr"])))

    def after(self, loss: Tensor | None, stepping: bool) -> bool:
        """A batch has ended; returns whether the test ends with it."""
        if loss is not None:
            self._total = loss.detach() if self._total is None else self._total + loss.detach()
        if not stepping:
            return False
        total, self._total = self._total, None
        return self._note(self._trials.mean(total))

    def _note(self, loss: float | None) -> bool:
        finder, search = self.finder, self._search
        if loss is None:
            self._idle += 1
            if self._idle >= search.num_training or not self._trials.module.automatic_optimization:
                raise MisconfigurationException(
                    f"lr_find got no loss from `{type(self._trials.module).__qualname__}.training_step` in {self._idle}"
                    " batches: return the loss, also in manual optimization."
                )
            return False
        smoothed = loss
        if math.isfinite(loss):
            self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
            self._averaged += 1
            smoothed = self._average / (1 - _SMOOTHING**self._averaged)
        rate = finder.rate(len(finder.results["lr"]))
        finder.results["lr"].append(rate)
        finder.results["loss"].append(smoothed)
        done = len(finder.results["lr"])
        self.status.show(f"lr_find: {done}/{search.num_training}  lr {rate:.2e}  loss {smoothed:.4g}")
        if done >= search.num_training:
            return True
        threshold = search.early_stop_threshold
        exploded = done > _WARM_UP and smoothed > (threshold or math.inf) * self._best
        if threshold is not None and (exploded or not math.isfinite(loss)):
            return True
        self._best = smoothed if done == 1 else min(self._best, smoothed)
        return False


def go_on_with(rate: float, optimizers: Iterable[Optimizer], schedulers: Iterable[Any]) -> None:
    """Let optimizers that have trained already go on with a learning rate, and their schedulers from there."""
    for optimizer in optimizers:
        set_learning_rate(optimizer, rate)
        for group in optimizer.param_groups:
            if "initial_lr" in group:
                group["initial_lr"] = rate
    stack = list(schedulers)
    while stack:
        scheduler = stack.pop()
        stack += getattr(scheduler, "_schedulers", [])  # in a sequence or a chain
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [rate for _ in scheduler.base_lrs]


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give all parameter groups a learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # an optimizer that is captured or compiled keeps the tensor
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a parameter group that are numbers."""
    return {
        name: float(value)
        for name, value in group.items()
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    }
