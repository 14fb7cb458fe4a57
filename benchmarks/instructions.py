"""Instructions a step, counted by valgrind: numbers that a busy machine does not change."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["instructions_a_step"]

_HERE = Path(__file__).resolve().parent
_REFERENCES = re.compile(r"I\s+refs:\s+([\d,]+)")
# How many instructions glibc's malloc needs depends on all that was allocated before: the same code in a folder with a
# longer name costs 1% of a step more or less. With these settings freed blocks are never merged, and large blocks are
# mapped one by one, so that the count is the same again. Other allocators ignore them.
_STEADY_HEAP = "glibc.malloc.tcache_count=65535:glibc.malloc.mmap_threshold=1100:glibc.malloc.mmap_max=1000000"
_OPTIONS = ("--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null", "--log-file=%p.log")


def instructions_a_step(
    runs: Mapping[str, Sequence[str]], short: int, long: int, environment: Mapping[str, str], folder: str
) -> tuple[dict[tuple[str, str], float], dict[str, str]]:
    """Counts the instructions of a short and a long run, and divides their difference by the difference in steps.

    Args:
        runs: Contestant -> the workloads that it runs.
        short: Steps of the short run.
        long: Steps of the long run.
        environment: Of the processes that are counted.
        folder: An empty folder, for the logs.

    Returns:
        (contestant, workload) -> instructions a step; and contestant -> why numbers of it are missing.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        return {}, {"raw": "skipped, because valgrind is not installed"}
    request = {"short": short, "long": long, "runs": runs}
    done = subprocess.run(
        [valgrind, *_OPTIONS, sys.executable, "-W", "ignore", str(_HERE / "counted.py"), json.dumps(request)],
        cwd=folder,
        env={**environment, "PYTHONHASHSEED": "0", "GLIBC_TUNABLES": _STEADY_HEAP},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {}, {"raw": f"failed under valgrind: {done.stderr.strip() or done.returncode}"}
    counts: dict[tuple[str, str], float] = {}
    problems: dict[str, str] = {}
    for path in Path(folder).glob("*.json"):
        report = json.loads(path.read_text())
        if "error" in report:
            problems[report["contestant"]] = report["error"]
        elif "marks" in report:
            begin, middle, end = (_count(Path(folder, f"{pid}.log")) for pid in report["marks"])
            a_step = ((end - middle) - (middle - begin)) / (long - short)
            counts[report["contestant"], report["item"]] = a_step
    return counts, problems


def _count(log: Path) -> int:
    found = _REFERENCES.search(log.read_text())
    assert found is not None, f"valgrind left no count in {log.name}: {log.read_text()}"
    return int(found[1].replace(",", ""))
