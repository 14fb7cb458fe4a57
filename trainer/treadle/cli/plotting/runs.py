"""The runs below some folders, and the numbers that each has logged."""

from __future__ import annotations

import csv
import math
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from treadle.cli.plotting.checkpoints import saved_steps
from treadle.cli.plotting.events import read_scalars
from treadle_fabric import MisconfigurationException, near_names

__all__ = ["Run", "read_runs"]

_METRICS = "metrics.csv"
_EVENTS = "events.out.tfevents."
_CHECKPOINTS = "checkpoints"
_RATE = re.compile(r"lr-(?!.*-(?:momentum|weight_decay)$)|(?:lr|learning_rate)$")
_HPARAMS = re.compile(r"\d{10,}\.\d+")  # the folder that SummaryWriter.add_hparams makes within the run's


@dataclass
class Run:
    """What one run has logged."""

    folder: Path
    values: dict[str, dict[int, float]]
    """The values of each metric by step, steps in order."""
    epochs: dict[int, float]
    """The epoch by step, where one was logged; empty if none was."""
    saved: list[int]
    """The steps of the checkpoints: at each, that many batches had stepped."""
    name: str = ""
    """What tells the run from the others."""

    @property
    def rates(self) -> list[str]:
        """The names of learning rates, as LearningRateMonitor logs them."""
        return [name for name in self.values if _RATE.match(name)]

    @property
    def metrics(self) -> list[str]:
        """The other names, in the order in which they were first logged."""
        return [name for name in self.values if not _RATE.match(name)]

    def epoch_at(self, step: int) -> float:
        """Return the epoch of a step: that of the next step with an epoch, or of the last one."""
        known = list(self.epochs)
        return self.epochs[known[min(bisect_left(known, step), len(known) - 1)]]

    def points(self, metric: str, x: str) -> list[tuple[float, float]]:
        """Return the points of a metric, in order.

        Args:
            metric: its name.
            x: "step", or "epoch" for one point an epoch, with the mean of its values.
        """
        values = self.values.get(metric, {})
        if x == "step":
            return list(values.items())
        by_epoch: dict[float, list[float]] = {}
        for step, value in values.items():
            by_epoch.setdefault(self.epoch_at(step), []).append(value)
        return [(epoch, sum(group) / len(group)) for epoch, group in sorted(by_epoch.items())]

    def marks(self, x: str) -> list[float]:
        """Return where its checkpoints are on the axis: at the last step before each, counted from 0 as in the logs."""
        steps = [max(step - 1, 0) for step in self.saved]
        return [float(step) if x == "step" else self.epoch_at(step) for step in steps]


def read_runs(folders: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Read all runs in some folders and below them.

    A run is a folder with a ``metrics.csv``, or with event files of TensorBoard. Where a folder has both, the
    ``metrics.csv`` is read.

    Returns:
        The runs that have logged something, in natural order, and a note on each that has not.

    Raises:
        MisconfigurationException: a folder is not there, or nothing in it was logged by a run.
    """
    found: dict[Path, Run] = {}
    notes: list[str] = []
    for given in folders:
        top = _existing(given)
        places = [folder for folder in _run_folders(top) if folder not in found]
        if not places and top not in found and not any(folder.is_relative_to(top) for folder in found):
            raise MisconfigurationException(
                f"There is no {_METRICS} and no event file of TensorBoard in {given!r}, or in a folder below it. Give "
                "the folder of a run, or one above several, such as lightning_logs."
            )
        for folder in places:
            run = _read_run(folder)
            if run.values:
                found[folder] = run
            else:
                notes.append(f"{folder}: nothing was logged")
    if not found:
        raise MisconfigurationException(
            f"No number was logged in {', '.join(map(repr, folders))}. {'; '.join(notes)}. CSVLogger writes rows after "
            "every 100 steps, or at the end of the run: flush_logs_every_n_steps=1 has them written at once."
        )
    runs = _join_groups(found)
    for run, name in zip(runs, _names([run.folder for run in runs]), strict=True):
        run.name = name
    return runs, notes


def _join_groups(found: dict[Path, Run]) -> list[Run]:
    """Put into each run what ``SummaryWriter.add_scalars`` wrote into folders below it, such as ``loss_val``."""
    runs = []
    for folder, run in found.items():
        whole = found.get(folder.parent)
        names = list(run.values)
        if whole is not None and len(names) == 1 and folder.name.startswith(prefix := names[0].replace("/", "_") + "_"):
            whole.values[f"{names[0]}/{folder.name.removeprefix(prefix)}"] = run.values[names[0]]
        else:
            runs.append(run)
    return runs


def _existing(given: str) -> Path:
    """Return the folder that was given, or the folder of the file that was given."""
    path = Path(given).expanduser()
    if path.is_file() and (path.name == _METRICS or path.name.startswith(_EVENTS)):
        path = path.parent
    if path.is_dir():
        return path.absolute()
    if path.exists():
        raise MisconfigurationException(
            f"{given!r} is no folder, and neither a {_METRICS} nor an event file of TensorBoard. Give the folder of a "
            "run, or one above several, such as lightning_logs."
        )
    if "://" in given:
        raise MisconfigurationException(f"{given!r} is not on this machine. Copy it here, and give the copy.")
    parent = path.parent
    there = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    near = near_names(path.name, there) if there else ""
    raise MisconfigurationException(f"There is no folder {given!r}. {near}".rstrip())


def _run_folders(top: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(top):
        is_run = _METRICS in files or any(file.startswith(_EVENTS) for file in files)
        folders[:] = sorted(
            (
                folder
                for folder in folders
                if not folder.startswith(".")
                and not folder.endswith(".ckpt")
                and not (is_run and (folder == _CHECKPOINTS or _HPARAMS.fullmatch(folder)))
            ),
            key=_natural,
        )
        if is_run:
            yield Path(parent)


def _read_run(folder: Path) -> Run:
    file = folder / _METRICS
    if file.is_file():
        values = _read_csv(file)
    else:
        values = read_scalars(folder.glob(f"{_EVENTS}*"))
        if set(values.get("hp_metric", {}).values()) == {-1.0}:  # the logger's placeholder
            del values["hp_metric"]
    epochs = values.pop("epoch", {})
    ordered = {name: dict(sorted(points.items())) for name, points in values.items()}
    return Run(folder, ordered, dict(sorted(epochs.items())), saved_steps(folder / _CHECKPOINTS))


def _read_csv(path: Path) -> dict[str, dict[int, float]]:
    """Read the numbers by column and step; rows without a step, and cells that are no numbers, are left out."""
    values: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            step = _number(row.get("step"))
            if step is None or not math.isfinite(step):
                continue
            for name, cell in row.items():
                if name and name != "step" and (value := _number(cell)) is not None:
                    values.setdefault(name, {})[int(step)] = value
    return values


def _number(cell: object) -> float | None:
    try:
        return float(cell) if isinstance(cell, str) else None
    except ValueError:
        return None


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the part of each path that tells it from the others."""
    if len(folders) == 1:
        return [folders[0].name or str(folders[0])]
    parts = [folder.parts for folder in folders]
    first = next(i for i in range(len(parts[0]) + 1) if len({p[: i + 1] for p in parts}) > 1)
    rest = [p[first:] for p in parts]
    last = 0  # what all have at their ends says nothing either
    while all(len(p) > last + 1 for p in rest) and len({p[-1 - last] for p in rest}) == 1:
        last += 1
    return [os.path.join(*p[: len(p) - last]) if p else parts[i][-1] for i, p in enumerate(rest)]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that puts version_2 before version_10."""
    pieces: Iterable[str] = re.findall(r"\d+|\D+", name)
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in pieces]
