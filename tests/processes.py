"""Test files that are programs too, and the processes that a program leaves running."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
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
        env=importing_tests(),
        **captured,
        **kwargs,
    )
    assert done.returncode == 0, (done.stderr or "")[-3000:]
    return done.stderr or ""


def importing_tests() -> dict[str, str]:
    """The environment of a program that can import ``tests``."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def wait_until(met: Callable[[], object], timeout: float = 60, every: float = 0.01) -> None:
    """Return as soon as ``met()`` is true; raise TimeoutError after ``timeout`` seconds.

    Args:
        met: What is waited for.
        timeout: Seconds that it may take; generous, for a machine that has other things to do.
        every: Seconds between two looks.
    """
    until = time.monotonic() + timeout
    while not met():
        if time.monotonic() > until:
            raise TimeoutError(f"waited {timeout:g} s in vain for {met.__qualname__}")
        time.sleep(every)


def thread_runs(function: str, thread: threading.Thread | None = None) -> bool:
    """Whether a thread is in a function of this name (``"<module>"`` is a program), or in what that called.

    Args:
        function: Its name.
        thread: Default: the main thread.
    """
    frame: FrameType | None = sys._current_frames().get((thread or threading.main_thread()).ident or 0)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None


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
