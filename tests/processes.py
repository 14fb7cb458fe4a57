"""Test files that are programs too, and the processes that a program leaves running."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

import psutil

from treadle_fabric import find_free_port, rank_zero_only

ROOT = Path(__file__).parent.parent
_OF_GLOO = re.compile(r"\[Gloo\]|peer ranks")  # of the lines of several processes, some are broken


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


def own_text(output: str) -> str:
    """What a program wrote to stdout, without the lines of gloo, which in torch 2.9 tells there of each group."""
    return "".join(line for line in output.splitlines(keepends=True) if not _OF_GLOO.search(line))


def own_lines(output: str) -> list[str]:
    """The lines of :func:`own_text` that are not empty."""
    return [line for line in own_text(output).splitlines() if line]


def run_in_ranks(function: Callable[..., object], *arguments: Any, devices: int = 2, timeout: float = 90) -> str:
    """Run a function in ``devices`` forks of this process, each with the environment of its rank.

    To the code under test they are processes that a launcher has started; as forks they need not import anything anew,
    which takes seconds. As in a program, warnings are printed and are no errors.

    Args:
        function: What each rank calls.
        arguments: What it is called with.
        devices: The number of ranks; 1: a process without a rank.
        timeout: Seconds after which all are killed.

    Returns:
        What the ranks wrote to stdout and stderr.

    Raises:
        AssertionError: One of them ended with another exit status than 0.
    """
    with tempfile.TemporaryFile("w+b", buffering=0) as output:
        port = str(find_free_port())
        running = {os.fork() or _run_rank(function, arguments, rank, devices, port, output) for rank in range(devices)}
        statuses: list[int] = []

        def ended() -> bool:
            for pid in list(running):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    running.remove(pid)
                    statuses.append(os.waitstatus_to_exitcode(status))
            return not running

        try:
            wait_until(ended, timeout)
        except TimeoutError as e:
            output.seek(0)
            e.add_note(f"Of {devices} ranks {len(running)} still run; they said: {output.read().decode()[-3000:]}")
            raise
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        output.seek(0)
        said = output.read().decode()
    assert statuses == [0] * devices, f"{statuses}: {said[-3000:]}"
    return said


def _run_rank(function: Any, arguments: Any, rank: int, devices: int, port: str, output: IO[bytes]) -> NoReturn:
    """In the fork: run, and end without what belongs to the parent."""
    status = 1
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        warnings.resetwarnings()
        warnings.showwarning = lambda *args: print(warnings.formatwarning(*args[:4]), file=sys.stderr)
        logging.getLogger().handlers.clear()  # pytest's, which would keep the messages
        if devices > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
            os.environ |= {"WORLD_SIZE": str(devices), "LOCAL_RANK": str(rank)}
        rank_zero_only.rank = rank
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


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
