"""The table, the files and the chart."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from measure import Result

__all__ = ["machine_facts", "table", "write"]

_REFERENCE_UNITS = {"ddp": "us", "instructions": "k"}
"""Kind -> the unit of the raw loop, where costs are in percent of it."""
_COLUMNS = ("item", "raw", "Lightning over raw", "Treadle over raw", "ratio", "bar", "ok")


def machine_facts() -> dict[str, Any]:
    """What the numbers depend on; nothing that names the machine."""
    versions: dict[str, str] = {}
    for name in ("lightning", "treadle", "accelerate", "tensorboard", "tqdm", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "source tree" if name == "treadle" else "absent"
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_before": round(os.getloadavg()[0], 2),
        **versions,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if (info.exists())
        else []
    )
    return names[0] if names else platform.processor() or "unknown"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    digits = 0 if unit in ("ms", "frames") or abs(value) >= 1000 else 1
    return f"{value:,.{digits}f} {unit}"


def _row(result: Result, which: str) -> tuple[str, ...]:
    item, values = result.item, getattr(result, which)
    ratio = result.ratio
    if which == "typical":
        lightning, treadle = values.get("lightning"), values.get("treadle")
        ratio = treadle / lightning if lightning and treadle is not None and lightning > 0 else None
    reference_unit = _REFERENCE_UNITS.get(item.kind, item.unit)
    passed = {True: "yes", False: "NO", None: "-"}[result.ok if which == "cost" else None]
    return (
        item.title,
        _number(values.get("raw"), reference_unit),
        _number(values.get("lightning"), item.unit),
        _number(values.get("treadle"), item.unit),
        "-" if ratio is None else f"{ratio:.3f}",
        item.bar,
        passed,
    )


def table(results: list[Result], which: str = "cost") -> str:
    """The results as a markdown table that also reads well in a terminal; ``which`` is "cost" (best) or "typical"."""
    rows = [_COLUMNS, *(_row(result, which) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
        if not number:
            lines.append(
                "|"
                + "|".join("-" * (width + 1) + ("-" if not column else ":") for column, width in enumerate(widths))
                + "|"
            )
    return "\n".join(lines)


def _accelerate(results: list[Result]) -> str:
    parts = [
        f"{result.item.title} {_number(result.cost['accelerate'], result.item.unit)}"
        for result in results
        if "accelerate" in result.cost
    ]
    return f"Accelerate, over raw: {'; '.join(parts)}." if parts else ""


def _choices(results: list[Result]) -> list[str]:
    return [
        f"{result.item.title}, {name}: {note}."
        for result in results
        if result.item.kind == "slope"
        for name, note in result.notes.items()
        if name in result.cost
    ]


def _absentees(results: list[Result]) -> list[str]:
    return [
        f"{result.item.title}, {name}: {note.strip().splitlines()[-1]}"
        for result in results
        for name, note in result.notes.items()
        if name not in result.cost
    ]


def _stacks(results: list[Result]) -> list[str]:
    return [
        f"{result.item.title}, {name}: {note}"
        for result in results
        if result.item.kind == "frames"
        for name, note in result.notes.items()
        if name in result.cost
    ]


def remarks(results: list[Result]) -> list[str]:
    """What is worth saying under the table."""
    return [line for line in (_accelerate(results), *_choices(results), *_absentees(results)) if line]


def write(results: list[Result], facts: dict[str, Any], rounds: int, folder: Path, part: str = "") -> list[Path]:
    """Writes the table (.md), every number (.json) and the chart (.png); returns the paths.

    ``part`` names the items of a run that did not measure all.

    Raises:
        OSError: If the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    stem = f"{today}-{torch.__version__.split('+')[0]}-cpu{part and '-'}{part}"
    chart = folder / f"{stem}.png"
    paths = [folder / f"{stem}.md", folder / f"{stem}.json"]
    if _chart(results, facts, chart):
        paths.append(chart)
    paths[0].write_text(_page(results, facts, rounds, chart.name if chart in paths else None))
    data = {
        "machine": facts,
        "rounds": rounds,
        "items": {
            result.item.key: {
                "title": result.item.title,
                "unit": result.item.unit,
                "cost": result.cost,
                "typical": result.typical,
                "ratio": result.ratio,
                "bar": result.item.bar,
                "ok": result.ok,
                "rounds": result.rounds,
                "short": result.item.short,
                "long": result.item.long,
            }
            for result in results
        },
    }
    paths[1].write_text(json.dumps(_rounded(data), indent=1) + "\n")
    return paths


def _rounded(data: Any) -> Any:
    if isinstance(data, float):
        return round(data, 3)
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    return [_rounded(value) for value in data] if isinstance(data, list) else data


def _page(results: list[Result], facts: dict[str, Any], rounds: int, chart: str | None) -> str:
    machine = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items())
    explain = [f"- **{result.item.title}**: {result.item.explain}." for result in results]
    lines = [
        "# Cost over the hand-written loop",
        "",
        f"Measured in one run: {machine}.",
        "",
        "A 32-64-2 network on the CPU with one thread, batches of 8 from a list. Each contestant has a process of its",
        f"own; where time is measured they take turns, {rounds} rounds, and instructions are counted once. A cost is a",
        "slope between a short and a long run, so set-up does not count, less the slope of the hand-written loop.",
        "Ratio is Treadle's cost as a share of Lightning's.",
        "",
        "Best of the rounds:",
        "",
        table(results),
        "",
        *[f"- {line}" for line in remarks(results)],
        *(["", f"![The costs as bars]({chart})"] if chart else []),
        "",
        "Median of the rounds:",
        "",
        table(results, "typical"),
        "",
        "What a unit is:",
        "",
        *explain,
        *(["", *stacks] if (stacks := _stacks(results)) else []),
    ]
    return "\n".join(lines) + "\n"


_COLOURS = {"lightning": "#b9bec7", "accelerate": "#8fb8de", "treadle": "#1f5fa8"}
_NAMES = {"lightning": "Lightning", "accelerate": "Accelerate", "treadle": "Treadle"}
_FLOOR = 0.5  # the left end of the logarithmic axis, in microseconds


def _chart(results: list[Result], facts: dict[str, Any], path: Path) -> bool:
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        return False
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    steps = [result for result in results if result.item.kind == "slope" and len(result.cost) > 1]
    others = [
        result
        for result in results
        if result.item.kind != "slope" and result.cost and result.item.key != "fabric-import"
    ]
    if not steps:
        return False
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = pyplot.figure(figsize=(11, 5.6), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1.9, 1))
        _cost_bars(left.subplots(), steps)
        if others:
            for axes, result in zip(right.subplots(len(others), 1, squeeze=False)[:, 0], others, strict=True):
                _small_bars(axes, result)
        figure.suptitle(
            f"Cost over the hand-written loop (torch {facts['torch']}, Lightning {facts['lightning']}, one CPU thread)",
            fontsize=11,
        )
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
    return True


def _cost_bars(axes: Any, results: list[Result]) -> None:
    height, labels = 0.26, []
    highest = 1.0
    for row, result in enumerate(reversed(results)):
        present = [name for name in ("treadle", "accelerate", "lightning") if name in result.cost]
        for place, name in enumerate(present):
            value = result.cost[name]
            highest = max(highest, value)
            offset = row + (place - (len(present) - 1) / 2) * height
            axes.barh(offset, max(value, _FLOOR) - _FLOOR, height * 0.9, left=_FLOOR, color=_COLOURS[name], zorder=2)
            axes.text(
                max(value, _FLOOR) * 1.08, offset, f"{value:,.0f}" if value >= 10 else f"{value:.1f}", va="center"
            )
        labels.append(f"{result.item.title}\n(raw {result.cost.get('raw', 0):,.0f} us)")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(_FLOOR, highest * 3)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("microseconds over the raw loop (logarithmic)")
    axes.grid(axis="x", color="#e6e6e6", zorder=0)
    axes.tick_params(axis="y", length=0)
    used = [name for name in ("lightning", "accelerate", "treadle") if any(name in result.cost for result in results)]
    handles = [axes.barh(0, 0, color=_COLOURS[name]) for name in used]
    axes.legend(
        handles,
        [_NAMES[name] for name in used],
        loc="upper center",
        bbox_to_anchor=(0.45, 1.09),
        ncols=3,
        frameon=False,
    )


def _small_bars(axes: Any, result: Result) -> None:
    present = [name for name in ("treadle", "accelerate", "lightning") if name in result.cost]
    values = [result.cost[name] for name in present]
    axes.barh(
        [_NAMES[name] for name in present],
        [max(value, 0.0) for value in values],
        0.6,
        color=[_COLOURS[name] for name in present],
    )
    for place, value in enumerate(values):
        axes.text(max(value, 0.0), place, f" {_number(value, result.item.unit)}", va="center")
    axes.set_title(result.item.title, fontsize=9, loc="left")
    axes.set_xlim(0, max(*values, 0.0, 1e-9) * 1.35 if len(values) > 1 else max(values[0], 1e-9) * 1.35)
    axes.set_xticks([])
    axes.set_ylim(-0.6, max(len(present), 2) - 0.4)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
