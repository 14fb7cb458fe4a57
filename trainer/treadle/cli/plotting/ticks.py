"""The numbers at the axes: short, and told apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["labels", "linear_ticks", "logarithmic_ticks"]

_UNITS: Final = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
_MOST_DECIMALS: Final = 9


def labels(values: Sequence[float]) -> list[str]:
    """Return texts with the same number of decimals for evenly spaced ticks.

    Example::

        >>> labels([0, 5000, 10000]), labels([0.0, 0.0005, 0.001]), labels([0.95, 1.0])
        (['0', '5k', '10k'], ['0', '0.5e-3', '1.0e-3'], ['0.95', '1.00'])
    """
    largest = max((abs(value) for value in values), default=0.0)
    scale, unit = 1.0, ""
    if largest >= 1e4:
        scale, unit = next(each for each in _UNITS if largest >= each[0])
    elif 0 < largest < 5e-3:
        power = math.floor(math.log10(largest))
        scale, unit = 10.0**power, f"e{power}"
    scaled = [value / scale for value in values]
    gap = min((b - a for a, b in itertools.pairwise(scaled) if b > a), default=largest / scale or 1.0)
    decimals = next(
        (d for d in range(_MOST_DECIMALS) if all(abs(v - round(v, d)) < gap / 100 for v in scaled)), _MOST_DECIMALS
    )
    return [f"{value:.{decimals}f}{unit}" if value else "0" for value in scaled]


def _each(value: float) -> str:
    """Return the text of a tick whose neighbors are many times smaller or larger."""
    scale, unit = next((each for each in _UNITS if 1e4 <= value < 1e12 and value >= each[0]), (1.0, ""))
    number, _, power = f"{value / scale:.4g}".partition("e")
    return f"{number}{unit}" + (f"e{int(power)}" if power else "")


def linear_ticks(axes: Axes, which: str, integer: bool = False) -> None:
    """Give an axis, "x" or "y", ticks with short labels."""
    from matplotlib.ticker import Formatter, MaxNLocator  # an extra, and heavy

    class Even(Formatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return labels([x])[0]

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return labels(list(values))

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(6, integer=integer, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(Even())


def logarithmic_ticks(axes: Axes, lowest: float, highest: float) -> None:
    """Make the vertical axis logarithmic; within less than a decade, ticks are evenly spaced numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # an extra, and heavy

    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    decades = math.log10(highest / lowest)
    if decades < 1:
        linear_ticks(axes, "y")
        return
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _each(value)))
