"""What is drawn: the curves of each panel, as numbers."""

from __future__ import annotations

import fnmatch
import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from treadle.cli.plotting.runs import Run
from treadle_fabric import MisconfigurationException, near_names

__all__ = ["LEARNING_RATE", "Curve", "Panel", "make_panels", "smoothed"]

LEARNING_RATE = "learning rate"
_MOST_PANELS = 100
_MOST_POINTS = 4000  # of a curve: more than any panel has pixels

Points = list[tuple[float, float]]


@dataclass
class Curve:
    """The values of one metric of one run."""

    run: int
    """The number of the run, from 0."""
    style: int
    """The number of the line style, from 0: learning rates of several groups differ in it."""
    points: Points
    """The points of the line; all are finite."""
    raw: Points
    """The points before smoothing; empty without smoothing."""
    marks: Points
    """Where the run was saved."""
    not_finite: list[float]
    """Where the values are NaN or infinite."""


@dataclass
class Panel:
    """One metric of all runs that logged it."""

    title: str
    curves: list[Curve] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    """The names of the line styles, where there are several."""

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest value; NaN and NaN without any."""
        values = [y for curve in self.curves for _, y in curve.points + curve.raw]
        return min(values, default=math.nan), max(values, default=math.nan)


def make_panels(
    runs: Sequence[Run], patterns: Sequence[str] = (), x: str = "step", smooth: float = 0.0, rates: bool = True
) -> list[Panel]:
    """Make a panel for each metric, and a last one for the learning rates.

    Args:
        runs: the runs.
        patterns: globs that choose metrics. Default: all metrics.
        x: "step" or "epoch".
        smooth: see :func:`smoothed`. The learning rate is never smoothed.
        rates: whether to draw the learning rates.

    Raises:
        MisconfigurationException: a pattern fits no metric, a run has no epochs for the axis, or there are too many
            panels.
    """
    if x == "epoch" and (without := [run.name for run in runs if not run.epochs]):
        raise MisconfigurationException(
            f"The axis is to show epochs, and none was logged in {', '.join(map(repr, without))}. Draw by step."
        )
    names = _chosen(runs, patterns)
    panels = [_panel(name, runs, [name], x, smooth) for name in names]
    columns = list(dict.fromkeys(name for run in runs for name in run.rates if name not in names))
    if columns and (rates or not panels):
        panels.append(_panel(LEARNING_RATE, runs, columns, x, 0.0))
    if len(panels) > _MOST_PANELS:
        raise MisconfigurationException(
            f"{len(panels)} metrics would make as many panels, and a picture has at most {_MOST_PANELS}. Choose some, "
            "such as --metrics 'val_*'."
        )
    return panels


def _chosen(runs: Sequence[Run], patterns: Sequence[str]) -> list[str]:
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if not patterns:
        return metrics
    known = metrics + list(dict.fromkeys(name for run in runs for name in run.rates))
    chosen: dict[str, None] = {}
    for pattern in patterns:
        fitting = [name for name in known if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not fitting:
            raise MisconfigurationException(f"No metric is called {pattern!r}. {near_names(pattern, known)}")
        chosen.update(dict.fromkeys(fitting))
    return list(chosen)


def _panel(title: str, runs: Sequence[Run], columns: Sequence[str], x: str, smooth: float) -> Panel:
    panel = Panel(title, styles=list(columns) if len(columns) > 1 else [])
    for number, run in enumerate(runs):
        marks = run.marks(x)
        for style, column in enumerate(columns):
            if not (given := run.points(column, x)):
                continue
            raw = [(at, y) for at, y in given if math.isfinite(y)]
            line = smoothed(raw, smooth) if smooth else raw
            panel.curves.append(
                Curve(
                    number,
                    style,
                    _thinned(line),
                    _thinned(raw) if smooth else [],
                    _on_line(line, marks) if title != LEARNING_RATE else [],
                    [at for at, y in given if not math.isfinite(y)],
                )
            )
    return panel


def smoothed(points: Points, weight: float) -> Points:
    """Return exponential moving averages, each divided by the sum of its weights, as TensorBoard shows them.

    Args:
        points: x and y, in order.
        weight: how much of the average before each point stays in it, from 0 to below 1.
    """
    average, total = 0.0, 0.0
    result = []
    for x, y in points:
        average = weight * average + (1 - weight) * y
        total = weight * total + (1 - weight)
        result.append((x, average / total))
    return result


def _on_line(points: Points, marks: Sequence[float]) -> Points:
    """Return the marks with the heights of the line there; those before it or far behind it are left out."""
    xs = [x for x, _ in points]
    if len(xs) < 2:
        return []
    reach = median(b - a for a, b in itertools.pairwise(xs))
    found = []
    for mark in marks:
        if not xs[0] <= mark <= xs[-1] + reach:
            continue
        right = bisect_right(xs, mark)
        (x0, y0), (x1, y1) = points[max(right - 1, 0)], points[min(right, len(xs) - 1)]
        share = min(max((mark - x0) / (x1 - x0), 0.0), 1.0) if x1 > x0 else 0.0
        found.append((mark, y0 + share * (y1 - y0)))
    return found


def _thinned(points: Points) -> Points:
    """Return the lowest and the highest point of each of many equal parts, where there are more than can be seen."""
    if len(points) <= _MOST_POINTS:
        return points
    size = 2 * len(points) / _MOST_POINTS
    kept = [points[0]]
    for i in range(_MOST_POINTS // 2):
        part = points[int(i * size) : int((i + 1) * size)]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return [*kept, points[-1]]
