"""The scalars in TensorBoard's event files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from treadle_fabric import require_package

__all__ = ["read_scalars"]


def read_scalars(files: Iterable[Path]) -> dict[str, dict[int, float]]:
    """Read the scalars of one run, by name and step.

    Files are read in the order of their names, which begin with the time. A later value of a step replaces an earlier
    one, and where a file says that it begins anew at a step, all earlier values from that step on are dropped. A file
    whose end is missing is read up to there.

    Raises:
        MissingPackageError: tensorboard is not installed.
    """
    require_package("tensorboard", "Reading TensorBoard's event files", "trainer", "CSVLogger's files need no package.")
    # all three are of an extra, and heavy
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.compat.proto.event_pb2 import SessionLog
    from tensorboard.util.tensor_util import make_ndarray  # an extra

    found: dict[str, dict[int, float]] = {}
    for file in sorted(files, key=_age):
        for event in EventFileLoader(str(file)).Load():
            if event.HasField("session_log") and event.session_log.status == SessionLog.START and event.step:
                for values in found.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    found.setdefault(value.tag, {})[event.step] = float(make_ndarray(value.tensor).item())
    return {name: values for name, values in found.items() if values}


def _age(file: Path) -> list[Any]:
    """The name, which has the second and the number of the writer in its process; 10 comes after 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]
