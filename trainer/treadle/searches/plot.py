"""Draw a learning-rate range test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from treadle_fabric import require_package

__all__ = ["plot_range_test"]


def plot_range_test(
    results: Mapping[str, Sequence[float]], mode: str, suggested: float | None, *, show: bool, ax: Any
) -> Any:
    """Draw the loss against the learning rate; returns the figure.

    Args:
        results: The rates as "lr", and the losses as "loss".
        mode: "exponential": the axis of the rates is logarithmic.
        suggested: A rate to mark, or None.
        show: Whether to show the figure.
        ax: The axes to draw on; None for a new figure.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require_package("matplotlib", "The plot of a range test", "plot")
    import matplotlib.pyplot as plt  # heavy, and an extra

    rates, losses = results["lr"], results["loss"]
    if ax is None:
        figure, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    else:
        figure = ax.figure
    ax.plot(rates, losses, color="#1f77b4", linewidth=1.5)
    if mode == "exponential":
        ax.set_xscale("log")
    bottom, top = _shown_range(losses)
    if top > bottom:
        ax.set_ylim(bottom, top)
    ax.set_xlabel("learning rate")
    ax.set_ylabel("loss (smoothed)")
    ax.grid(True, which="major", alpha=0.3)
    if suggested is not None:
        index = list(rates).index(suggested)
        label = f"suggestion: {suggested:.3g}"
        ax.axvline(suggested, color="#d62728", linewidth=1, linestyle="--", alpha=0.6)
        ax.plot([suggested], [losses[index]], "o", color="#d62728", markersize=7, label=label)
        ax.legend(loc="best")
    if show:
        plt.show()
    return figure


def _shown_range(losses: Sequence[float]) -> tuple[float, float]:
    """The part of the axis that shows how the loss falls; the curve leaves the picture where the loss explodes."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return 0.0, 0.0
    low = min(finite)
    high = max(finite[: finite.index(low) + 1])
    room = 0.1 * (high - low)
    return low - room, min(max(finite) + room, high + 5 * room)
