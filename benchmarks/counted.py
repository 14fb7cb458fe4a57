"""What valgrind runs and counts: ``counted.py '{"short": 50, "long": 550, "runs": {"raw": ["step"], ...}}'``.

Only torch is imported here. Each contestant has a fork that imports its package, and each workload a fork of that one,
so that torch and the package are imported once, which takes longest under valgrind.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from workloads import available, workload

_AT_ONCE = 2


def _fork(function: Callable[..., dict[str, Any]], contestant: str, *arguments: Any) -> int:
    """Runs a function in a fork, which leaves what it returned in a file named after the process."""
    if pid := os.fork():
        return pid
    try:
        report = function(contestant, *arguments)
    except BaseException:
        report = {"error": traceback.format_exc()}
    report["contestant"] = contestant
    Path(f"{os.getpid()}.json").write_text(json.dumps(report))
    os._exit(0)


def _mark() -> int:
    """A process that ends at once: valgrind's count of it is that of this process up to here."""
    if pid := os.fork():
        os.waitpid(pid, 0)
        return pid
    os._exit(0)


def _run(contestant: str, item: str, lengths: list[int]) -> dict[str, Any]:
    run = workload(item, contestant)
    for _ in range(2):  # the first runs import the rest, and let Python specialize its bytecode: four steps' worth
        run(lengths[0])
        gc.collect()
        gc.freeze()  # a collection of all that was imported is forty steps long, give or take two
    marks = [_mark()]
    for units in lengths:
        run(units)
        marks.append(_mark())
    return {"item": item, "marks": marks}


def _contestant(name: str, items: list[str], lengths: list[int]) -> dict[str, Any]:
    running: list[int] = []
    for item in items:
        problem = available(name, runtime=item == "fabric")
        if problem is not None:
            return {"error": problem}
        if len(running) == _AT_ONCE:
            os.waitpid(running.pop(0), 0)
        running.append(_fork(_run, name, item, lengths))
    for pid in running:
        os.waitpid(pid, 0)
    return {}


def _main() -> None:
    torch.set_num_threads(1)
    request = json.loads(sys.argv[1])
    for name, items in request["runs"].items():
        os.waitpid(_fork(_contestant, name, items, [request["short"], request["long"]]), 0)


if __name__ == "__main__":
    _main()
