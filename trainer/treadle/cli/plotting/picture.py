"""The picture: a grid of panels, with the names of the runs above it."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from treadle.cli.plotting.panels import LEARNING_RATE, Curve, Panel
from treadle.cli.plotting.ticks import linear_ticks, logarithmic_ticks
from treadle_fabric import MisconfigurationException, require_package

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ENDINGS", "check_output", "draw"]

ENDINGS: Final = (".png", ".svg", ".pdf")
_STYLE: Final[dict[Any, Any]] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.usetex": False,
}
_DOTS_PER_INCH: Final = 120
# By the largest number of panels: columns, and inches of a panel's width and height.
_SIZES: Final = ((1, 1, 7.0, 3.9), (4, 2, 5.2, 3.2), (9, 3, 4.2, 2.7), (10**6, 4, 3.7, 2.4))
_LINES: Final[tuple[Any, ...]] = ("-", "--", ":", "-.", (0, (1, 2, 4, 2)), (0, (6, 1, 1, 1, 1, 1)))
_NAMES: Final = ("blue", "orange", "green", "red", "purple", "brown", "pink", "gray", "olive", "cyan")
_LETTER: Final = 0.075  # inches that a letter of the smallest font takes, on average
_FEW_POINTS: Final = 20  # are shown as points, too
_MARK: Final = 7.0
_CROWD: Final = 40  # more checkpoints than this, in a panel, have smaller marks


def check_output(path: str) -> Path:
    """Return the path of the picture, and refuse one that cannot be written.

    Raises:
        MisconfigurationException: the ending is unknown, or a folder has this name.
        MissingPackageError: matplotlib is not installed.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in ENDINGS:
        raise MisconfigurationException(
            f"--output {path!r}: the ending says what kind of picture it is, and is one of {', '.join(ENDINGS)}."
        )
    if file.is_dir():
        raise MisconfigurationException(f"--output {path!r} is a folder. Give the name of a file.")
    require_package("matplotlib", "treadle plot", "plot")
    return file


def draw(panels: Sequence[Panel], names: Sequence[str], path: Path, x: str = "step", log_y: bool = False) -> None:
    """Draw panels in a grid, and write the picture. No display is needed.

    Args:
        panels: the panels.
        names: the names of the runs, by number.
        path: the file; its ending says which format.
        x: the label of the horizontal axis.
        log_y: whether vertical axes are logarithmic; that of a panel with values of 0 or below stays linear.
    """
    import matplotlib  # an extra, and heavy
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # an extra
    from matplotlib.figure import Figure

    columns, width, height = next(size[1:] for size in _SIZES if len(panels) <= size[0])
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(_STYLE):
        legend = _Legend(panels, names, width * columns)
        figure = Figure((width * columns, height * rows + legend.height), layout="constrained")
        FigureCanvasAgg(figure)
        colors = _colors(len(names))
        _draw_grid(figure, panels, (rows, columns), colors, x, log_y)
        legend.draw(figure, colors)
        content = io.BytesIO()
        figure.savefig(content, format=path.suffix[1:].lower(), dpi=_DOTS_PER_INCH)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())
    except OSError as e:
        raise MisconfigurationException(f"--output {str(path)!r} cannot be written: {e.strerror}.") from e


def _draw_grid(
    figure: Figure, panels: Sequence[Panel], shape: tuple[int, int], colors: Sequence[Any], x: str, log_y: bool
) -> None:
    first: Axes | None = None
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(*shape, i + 1, sharex=first)
        first = first or axes
        _draw_panel(axes, panel, colors, log_y, figure.get_figwidth() / shape[1])
        lowest = i + shape[1] >= len(panels)
        axes.tick_params(labelbottom=lowest)
        if lowest:
            axes.set_xlabel(x)
    assert first is not None
    linear_ticks(first, "x", integer=True)


def _draw_panel(axes: Axes, panel: Panel, colors: Sequence[Any], log_y: bool, width: float) -> None:
    axes.set_title(_wrapped(panel.title, int(width / _LETTER * 0.85)), loc="left", parse_math=False)
    marks = sum(len(curve.marks) for curve in panel.curves)
    between = "steps-post" if panel.title == LEARNING_RATE else "default"  # a rate holds until it is set anew
    for curve in panel.curves:
        _draw_curve(axes, curve, colors[curve.run], _MARK if marks <= _CROWD else _MARK / 2, between)
    axes.margins(x=0.03, y=0.08)
    lowest, highest = panel.range
    if log_y and 0 < lowest < highest:
        logarithmic_ticks(axes, lowest, highest)
    else:
        linear_ticks(axes, "y")


def _draw_curve(axes: Axes, curve: Curve, color: Any, mark_size: float, between: str) -> None:
    if curve.raw:
        axes.plot(*zip(*curve.raw), color=color, alpha=0.25, linewidth=0.8)
    if curve.points:
        few = len(curve.points) <= _FEW_POINTS
        axes.plot(
            *zip(*curve.points),
            color=color,
            linestyle=_LINES[curve.style % len(_LINES)],
            linewidth=1.4,
            drawstyle=between,
            marker="o" if few else None,
            markersize=5 if len(curve.points) == 1 else 2.5,
        )
    if curve.marks:
        axes.plot(*zip(*curve.marks), **_mark(color, mark_size))
    if curve.not_finite:
        top = [0.98] * len(curve.not_finite)
        axes.plot(curve.not_finite, top, "x", color=color, transform=axes.get_xaxis_transform(), clip_on=False)


def _mark(color: Any, size: float) -> dict[str, Any]:
    return {
        "linestyle": "none",
        "marker": "v",
        "markersize": size,
        "markerfacecolor": color,
        "markeredgecolor": "white",
        "markeredgewidth": size / 10,
        "zorder": 3,
    }


class _Legend:
    """The names of the runs, and what marks and line styles mean, above the panels.

    Args:
        panels: the panels below it.
        names: the names of the runs.
        width: the picture's width in inches.
    """

    def __init__(self, panels: Sequence[Panel], names: Sequence[str], width: float) -> None:
        longest = int((width - 1) / _LETTER)
        curves = [curve for panel in panels for curve in panel.curves]
        self._runs = [_shortened(name, longest) for name in names]
        self._marks = {
            "checkpoint": any(curve.marks for curve in curves),
            "not finite": any(curve.not_finite for curve in curves),
            "not smoothed": any(curve.raw for curve in curves),
        }
        self._styles = [_shortened(name, longest) for panel in panels for name in panel.styles]
        labels = [*self._runs, *(name for name, there in self._marks.items() if there), *self._styles]
        column = 0.75 + _LETTER * max(map(len, labels))
        self._columns = max(min(int((width - 0.4) / column), len(labels)), 1)
        self.height = 0.25 + 0.2 * math.ceil(len(labels) / self._columns)
        """The inches that it takes."""

    def draw(self, figure: Figure, colors: Sequence[Any]) -> None:
        from matplotlib.lines import Line2D  # an extra

        gray = "0.35"
        handles = [Line2D([], [], color=color, linewidth=2) for color in colors]
        means = {
            "checkpoint": Line2D([], [], **_mark(gray, _MARK)),
            "not finite": Line2D([], [], color=gray, linestyle="none", marker="x"),
            "not smoothed": Line2D([], [], color=gray, alpha=0.4, linewidth=0.8),
        }
        marks = [name for name, there in self._marks.items() if there]
        handles += [means[name] for name in marks]
        handles += [Line2D([], [], color=gray, linestyle=_LINES[i % len(_LINES)]) for i in range(len(self._styles))]
        legend = figure.legend(
            handles, [*self._runs, *marks, *self._styles], loc="outside upper left", ncols=self._columns
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def _colors(count: int) -> list[Any]:
    """Return a color for each run: well-known ones for a few, evenly spread ones for many."""
    if count <= len(_NAMES):
        return [f"tab:{name}" for name in _NAMES[:count]]
    import matplotlib  # an extra, and heavy

    return [matplotlib.colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def _wrapped(text: str, width: int) -> str:
    """Return a title in at most two lines."""
    if len(text) <= width:
        return text
    spaced = text.replace("/", "/ ").replace("_", "_ ").replace(".", ". ")
    lines = textwrap.wrap(spaced, width, break_long_words=True)
    lines = [line.replace("/ ", "/").replace("_ ", "_").replace(". ", ".") for line in lines]
    return "\n".join([lines[0], _shortened("".join(lines[1:]), width)])


def _shortened(text: str, length: int) -> str:
    """Return a text with its middle left out, where it is too long."""
    if len(text) <= length:
        return text
    half = max((length - 1) // 2, 1)
    return f"{text[:half]}…{text[-half:]}"
