"""Test files that are programs too, and the processes that a program leaves running."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent


def run_as_program(file: str, *arguments: object, timeout: float = 90, **kwargs: Any) -> str:
    """Run a file of tests as a program that can import ``tests``; returns what it said on stderr, or fails with it."""
    captured = {} if "stdout" in kwargs else {"capture_output": True}
    done = subprocess.run(
        [sys.executable, file, *map(str, arguments)],
        timeout=timeout,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        **captured,
        **kwargs,
    )
    assert done.returncode == 0, (done.stderr or "")[-3000:]
    return done.stderr or ""


def session(leader: int) -> list[psutil.Process]:
    """The processes of a session that run."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
