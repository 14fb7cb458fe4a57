"""What is different where a test launches: the other processes run that test again, and not all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["running_test", "without_pytest"]


def running_test(start_directory: str | None) -> str | None:
    """The running test as an argument for pytest; None where this process is not pytest.

    Args:
        start_directory: The folder in which this process was started.
    """
    name = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    program = Path(sys.argv[0] if sys.argv else "")
    if not name or not (program.stem in ("pytest", "py.test") or program.parent.name == "pytest"):
        return None
    file, separator, test = name.partition("::")
    start = Path(start_directory or ".")
    folder = next((folder for folder in (start, *start.parents) if (folder / file).exists()), start)
    return str(folder / file) + separator + test


def without_pytest(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that pytest is to take for one that the user started."""
    return {name: value for name, value in environ.items() if not name.startswith(("PYTEST_XDIST", "PYTEST_CURRENT"))}
