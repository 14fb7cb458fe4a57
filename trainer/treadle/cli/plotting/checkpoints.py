"""At which steps a run was saved."""

from __future__ import annotations

import re
from pathlib import Path

from treadle_fabric import CheckpointError
from treadle_fabric.checkpoint import checkpoints_in, read_outline

__all__ = ["saved_steps"]

_STEP = re.compile(r"step=(\d+)")


def saved_steps(folder: Path) -> list[int]:
    """Return the ``global_step`` of each checkpoint in a folder, in order.

    The step is in the file's name, as ``step=100``, or in its content, for which the whole file is read. A file that
    cannot be read does not count.
    """
    steps = set()
    for path, _ in checkpoints_in(folder, recursive=False):
        if named := _STEP.search(path.name):
            steps.add(int(named[1]))
            continue
        try:
            step = read_outline(path).get("global_step")
        except CheckpointError:
            continue
        if isinstance(step, int):
            steps.add(step)
    return sorted(steps)
