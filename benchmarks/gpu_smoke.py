"""What only an accelerator can show: one line a check, with its name, ok, failed or skipped, and a figure.

    python benchmarks/gpu_smoke.py [--cpu] [--list] [--only NAME ...] [--seconds 480]

The exit status is 1 if a check failed. ``--cpu`` runs everything that a CPU can show, in small. The checks use what
users use, and nothing else. Those that need a process group, or other variables, run in a process of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from smoke import CHECKS, Place


def in_own_process(name: str, cpu: bool, timeout: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, __file__, "--inside", str(report), "--only", name, *(["--cpu"] if cpu else [])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        if not report.exists():
            raise AssertionError(f"exit status {done.returncode}: {done.stderr[-2000:]}")
        kind, text = json.loads(report.read_text())
    if kind == "failed":
        raise AssertionError(text)
    return str(text)


def outcome(action: Callable[[], str]) -> tuple[str, str]:
    try:
        return "ok", action()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


def main() -> int:
    """Make the checks, print a line for each, and return 1 if one failed."""
    parser = argparse.ArgumentParser(description="What only an accelerator can show.")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, in small")
    parser.add_argument("--list", action="store_true", help="name the checks")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="those whose names have one of these parts")
    parser.add_argument("--seconds", type=float, default=480, help="checks that begin later are failures")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = [n for n in CHECKS if not given.only or any(part in n for part in given.only)]
    if given.list:
        print("\n".join(names))
        return 0
    if not given.cpu and not torch.cuda.is_available():
        print("There is no CUDA device here; --cpu runs what a CPU can show.", file=sys.stderr)
        return 2
    until, failed = time.monotonic() + given.seconds, 0
    warnings.filterwarnings("ignore")
    for name in names:
        start, this = time.monotonic(), CHECKS[name]
        with tempfile.TemporaryDirectory() as folder:
            at = Place(given.cpu, folder)
            if given.inside:
                Path(given.inside).write_text(json.dumps(outcome(lambda at=at, this=this: this.function(at))))
                return 0
            left = until - start
            if left < 0:
                kind, text = "failed", f"the {given.seconds:.0f} seconds were over"
            elif given.cpu and this.card:
                kind, text = "skipped", this.card
            elif this.apart:
                kind, text = outcome(lambda name=name, left=left: in_own_process(name, given.cpu, min(120, left)))
            else:
                kind, text = outcome(lambda at=at, this=this: this.function(at))
        failed += kind == "failed"
        print(f"{name:<70} {kind:<8} {time.monotonic() - start:5.1f} s  {text}", flush=True)
    on = "the CPU" if given.cpu else torch.cuda.get_device_name()
    print(f"{len(names)} checks on {on}, torch {torch.__version__}: {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
