"""A worker process: one contestant, commanded over pipes, so that contestants can take turns within seconds.

Commands are lines of JSON on standard input, answers are lines of JSON on the file descriptor given as the only
argument; standard output and error are free for progress bars.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import workloads
from workloads import REMARKS, available, ddp_step_times, frames_to_step, workload


def _prepare(request: dict[str, Any]) -> str | None:
    workloads.clock_name = request.get("clock", "wall")
    return available(request["contestant"], runtime=request.get("item") == "fabric")


def _main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    run: Callable[[int], float] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        try:
            if request["do"] == "prepare":
                answer = _prepare(request)
                run = workload(request["item"], request["contestant"]) if answer is None and "item" in request else None
            elif request["do"] == "run" and run is not None:
                answer = [run(units) for units in request["units"]]
            elif request["do"] == "remark":
                answer = REMARKS.get(request["item"])
            elif request["do"] == "ddp":
                answer = ddp_step_times(request["contestant"], request["short"], request["long"])
            elif request["do"] == "frames":
                answer = frames_to_step(request["contestant"])
            answers.write(json.dumps({"answer": answer}) + "\n")
        except Exception:
            answers.write(json.dumps({"error": traceback.format_exc()}) + "\n")


if __name__ == "__main__":
    _main()
