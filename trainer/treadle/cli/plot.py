"""``treadle plot``: draw the metrics of one or several runs."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from treadle.cli.plotting.panels import make_panels
from treadle.cli.plotting.picture import ENDINGS, check_output, draw
from treadle.cli.plotting.runs import read_runs

__all__ = ["add_plot_command"]


def add_plot_command(commands: Any) -> None:
    """Add ``plot`` to the subparsers of a command line."""
    parser = commands.add_parser(
        "plot",
        help="draw the metrics of one or several runs",
        description="Draw the metrics in metrics.csv, or in TensorBoard's event files, of all runs in some folders: "
        "one panel a metric, runs in different colors, and a last panel for the learning rates (lr-*). Triangles "
        "are checkpoints.",
    )
    parser.add_argument("folders", nargs="+", metavar="LOGDIR", help="the folder of a run, or one above several")
    parser.add_argument(
        "-o",
        "--output",
        default="metrics.png",
        metavar="FILE",
        help=f"the picture; its ending is one of {', '.join(ENDINGS)} (default: metrics.png)",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="the metrics to draw, also as globs such as 'val_*' (default: all)",
    )
    parser.add_argument(
        "--x",
        choices=("step", "epoch"),
        default="step",
        help="the horizontal axis; a point by epoch is the mean of the epoch's values (default: step)",
    )
    parser.add_argument(
        "--smooth",
        type=_weight,
        default=0.0,
        metavar="W",
        help="exponential moving average, as in TensorBoard: 0 for none, 0.9 for a smooth line (default: 0)",
    )
    parser.add_argument("--log-y", action="store_true", help="logarithmic vertical axes, where all values are above 0")
    parser.add_argument("--no-lr", action="store_true", help="leave out the panel of the learning rates")
    parser.set_defaults(run=_command)


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to below 1, such as 0.9.")
    return weight


def _command(given: argparse.Namespace) -> int:
    path = check_output(given.output)
    runs, notes = read_runs(given.folders)
    for note in notes:
        print(f"treadle: {note}", file=sys.stderr)
    panels = make_panels(runs, given.metrics, given.x, given.smooth, rates=not given.no_lr)
    draw(panels, [run.name for run in runs], path, given.x, given.log_y)
    print(f"{path}: {_count(len(panels), 'panel')}, {_count(len(runs), 'run')}")
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
