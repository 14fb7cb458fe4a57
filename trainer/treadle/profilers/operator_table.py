"""A table of operators that fits a report's columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treadle.profilers.report import readable, table

__all__ = ["operator_table"]


def operator_table(averages: Sequence[Any], sort_by: str, limit: int) -> list[str]:
    """The lines of a table.

    Args:
        averages: What ``torch.profiler.profile.key_averages`` returned.
        sort_by: The attribute of the averages by which rows are sorted, the largest first; "cuda" means the device.
        limit: The number of rows; -1 for all.
    """
    key = sort_by.replace("cuda", "device")
    rows = sorted(averages, key=lambda each: getattr(each, key), reverse=True)
    whole = sum(each.self_cpu_time_total for each in averages)
    on_device = sum(each.self_device_time_total for each in averages)
    with_memory = any(each.cpu_memory_usage or each.device_memory_usage for each in averages)
    columns = ["Self CPU %", "Self CPU", "CPU total", "CPU mean"]
    columns += [*(["Device"] if on_device else []), *(["Memory"] if with_memory else []), "Calls"]
    lines = []
    for each in rows if limit < 0 else rows[:limit]:
        cells = [f"{100 * each.self_cpu_time_total / whole:.2f}" if whole else "", _time(each.self_cpu_time_total)]
        cells += [_time(each.cpu_time_total), _time(each.cpu_time_total / max(each.count, 1))]
        cells += [_time(each.device_time_total)] if on_device else []
        cells += [_size(each.device_memory_usage or each.cpu_memory_usage)] if with_memory else []
        lines.append([readable(str(each.key).removeprefix("[pl][profile]")), *cells, str(each.count)])
    total = f"CPU time of all operators: {_time(whole)}" + (f"; device time: {_time(on_device)}" if on_device else "")
    return [*table(["Name", *columns], lines), total]


def _time(microseconds: float) -> str:
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.3f} s"
    return f"{microseconds / 1e3:.3f} ms" if microseconds >= 1e3 else f"{microseconds:.3f} us"


def _size(count: float) -> str:
    size, unit = float(count), "B"
    for larger in ("KB", "MB", "GB"):
        if abs(size) < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.2f} {unit}" if unit != "B" else f"{count} B"
