"""A process in which everything is imported already, and which forks to run the victims of `tests.faults.victim`.

As a program it is the server: it reads one job a line and writes the pid, then the exit status.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from tests.faults.victim import Case, train
from tests.processes import ROOT, wait_until
from tests.processes import session as processes_of
from torch.utils.data._utils import worker

from treadle.loops.fit import FitLoop

COUNT = [0, 0]
"""Python calls and returns so far, and those before training began."""


class ForkServer:
    """Runs cases in processes of their own, one at a time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forkserver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def run(
        self,
        case: Case,
        folder: Path,
        name: str,
        ckpt_path: str | None = None,
        *,
        die_at: int = 0,
        die_by: int = signal.SIGKILL,
        meanwhile: Callable[[int], None] | None = None,
        **trainer: Any,
    ) -> int:
        """Train ``case`` in ``folder`` and return the exit status, negative for a signal.

        Args:
            die_at: the Python call at which the process sends itself a signal; 0: none.
            die_by: the signal.
            meanwhile: is called with the process's id while it runs.
        """
        folder.mkdir(parents=True, exist_ok=True)
        job = {"case": asdict(case), "folder": str(folder), "name": name, "ckpt_path": ckpt_path}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({**job, "die": [die_at, die_by], "trainer": trainer}) + "\n")
        self._server.stdin.flush()
        pid = int(self._answer())
        if meanwhile is not None:
            meanwhile(pid)
        status = int(self._answer())
        self._wait_for_the_rest(pid, folder / f"{name}.txt")
        return status

    def _wait_for_the_rest(self, session: int, output: Path) -> None:
        """Workers and ranks see that their parent has gone, and go too."""
        try:
            wait_until(lambda: not processes_of(session), timeout=20)
        except TimeoutError:
            _end(processes_of(session), output)

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()


def _end(left: list[psutil.Process], output: Path) -> None:
    """Kill processes that outlived theirs and say what they were doing: only workers of data loaders may be left.

    A worker asks torch's watchdog for its parent. One whose parent dies before it has asked for the first time takes
    the wrong process for it and stays for ever, and so does one that waits for a lock that a killed process held; both
    are torch's.
    """
    try:
        for process in left:
            before = output.stat().st_size
            try:
                process.send_signal(signal.SIGUSR1)
            except psutil.NoSuchProcess:
                continue

            def stack(before: int = before) -> str:
                return output.read_bytes()[before:].decode(errors="replace")

            with contextlib.suppress(TimeoutError):
                wait_until(lambda: "in _worker_loop" in stack(), timeout=5)
            process.kill()
            assert "in _worker_loop" in stack(), f"a process outlived its parent: {stack()[-10000:]}"
    finally:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def die(call: int, by: int) -> None:
    """Let this process send itself a signal at its n-th Python call or return; 0: count them only."""

    begin = FitLoop._train.__code__

    def count(frame: Any, what: str, arg: Any) -> None:
        COUNT[0] += 1
        if COUNT[0] == call:
            os.kill(os.getpid(), by)
        if frame.f_code is begin and what == "call":
            COUNT[1] = COUNT[0]

    os.register_at_fork(after_in_child=lambda: sys.setprofile(None))
    sys.setprofile(count)


def serve() -> None:
    """Run jobs until there are no more."""
    torch.set_num_threads(1)
    worker.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds until a worker sees that its parent is gone: 5
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        train(
            Case(samples=3, epochs=1, every=1, log_every=1),
            Path(folder),
            "imports what is only imported when it is used",
        )
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run_job(json.loads(line))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run_job(job: dict[str, Any]) -> None:
    """In the fork: run, and end without what the server has still to do."""
    code = 1
    try:
        folder = Path(job["folder"])
        os.setsid()
        output = os.open(folder / f"{job['name']}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        os.chdir(folder)
        die(*job["die"])
        train(Case(**job["case"]), folder, job["name"], job["ckpt_path"], **job["trainer"])
        sys.setprofile(None)
        (folder / "calls").write_text(json.dumps(COUNT))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
    os._exit(0)  # the interpreter would take seconds to put away all that was imported
