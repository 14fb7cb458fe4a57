"""One process fails, all stop, and say why.

The processes that a launcher started on one machine share a private folder, the launch directory. Each failure that
leaves a launched function, or a script, is claimed there; whoever claims first owns the failure, and only that
traceback is shown. The files, where N counts the failures of a process and R is a global rank:

    launch.json      the launching process and the ranks it started
    joined_R         rank R reached the launch
    failure_N        rank and traceback of the first to fail; created whole, and once
    failed_N_R       rank R failed too, so nobody has to wait for it
    final_N          a process goes down because of it, so the others must as well
    reported_N       somebody printed it
    interrupted_R    rank R saw a KeyboardInterrupt

When every rank claims the same failure and none goes down, the scripts caught the exception and go on; the next one has
the next number.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed

from treadle_fabric.errors import ProcessFailedError

__all__ = [
    "LAUNCH_DIR_VARIABLE",
    "Failure",
    "FailureBoard",
    "Member",
    "call_guarded",
    "claim_failure",
    "current_member",
    "describe_exit",
    "end_process",
    "first_failure",
    "join_launch",
    "leave_launch",
]

T = TypeVar("T")

LAUNCH_DIR_VARIABLE = "TREADLE_LAUNCH_DIR"

# Seconds after a failure turned final. All of it has to fit into ten seconds, with room for a slow machine.
GRACE_STUCK = 2.0  # for a process that has not failed by itself, for example because it waits in a collective
GRACE_FAILING = 7.0  # for one that has, and is busy with its own clean-up
LOST_PEER_WAIT = 2.0  # how long a connection error waits for the failure that caused it
POLL_INTERVAL = 0.2

_LOST_PEER = re.compile(
    r"gloo|nccl|tcpstore|socket|recvvalue|connection (closed|reset|refused)|broken pipe", re.IGNORECASE
)


@dataclass(frozen=True)
class Failure:
    """The first failure of a launch: whose it is, and its traceback or a sentence in place of one."""

    rank: int
    text: str

    @property
    def summary(self) -> str:
        """The last line of the traceback, which names the exception."""
        lines = [line for line in self.text.strip().splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def __str__(self) -> str:
        is_traceback = "Traceback (most recent call last)" in self.text
        return f"rank {self.rank} failed:\n{self.text}" if is_traceback else self.text


class FailureBoard:
    """The launch directory, read and written.

    Args:
        directory: An existing folder that the processes of one machine share.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    @classmethod
    def create(cls, ranks: Sequence[int]) -> FailureBoard:
        """A new board for these global ranks, launched by the calling process."""
        board = cls(tempfile.mkdtemp(prefix="treadle-launch-"))
        board._write_once("launch.json", json.dumps({"pid": os.getpid(), "ranks": list(ranks)}))
        return board

    def launch_info(self) -> tuple[int, list[int]]:
        """The launching process and the ranks on this machine."""
        info = json.loads((self.directory / "launch.json").read_text())
        return int(info["pid"]), [int(rank) for rank in info["ranks"]]

    def _write_once(self, name: str, text: str) -> bool:
        # A link appears with its whole content or not at all, and only if nobody was faster.
        try:
            descriptor, draft = tempfile.mkstemp(dir=self.directory, prefix=".draft-")
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            return False  # the folder is gone: the launch is over
        try:
            os.link(draft, self.directory / name)
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                os.unlink(draft)
        return True

    def touch(self, name: str) -> bool:
        """Create an empty file; True for the one who did."""
        try:
            os.close(os.open(self.directory / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except OSError:
            return False
        return True

    def has(self, name: str) -> bool:
        """Whether a note of this name was left."""
        return (self.directory / name).exists()

    def claim(self, number: int, failure: Failure) -> bool:
        """Record a failure as the first of its number; False when another rank's is there already."""
        return self._write_once(f"failure_{number}", json.dumps({"rank": failure.rank, "text": failure.text}))

    def failure(self, number: int) -> Failure | None:
        """The failure that claimed this number, if any."""
        try:
            return Failure(**json.loads((self.directory / f"failure_{number}").read_text(encoding="utf-8")))
        except OSError:
            return None

    def latest(self) -> int:
        """The number of the newest failure, 0 without any."""
        with contextlib.suppress(OSError):
            names = [name for name in os.listdir(self.directory) if name.startswith("failure_")]
            return max((int(name.removeprefix("failure_")) for name in names), default=0)
        return 0

    def is_final(self, number: int, ranks: Sequence[int]) -> bool:
        """Whether the other processes must stop: one goes down, or some did not fail and wait for those that did."""
        return self.has(f"final_{number}") or any(
            self.has(f"joined_{rank}") and not self.has(f"failed_{number}_{rank}") for rank in ranks
        )

    def claim_report(self, number: int) -> bool:
        """True once per failure, for the one who is to print it."""
        return self.touch(f"reported_{number}") or not self.directory.exists()

    def report(self, number: int) -> None:
        """Print the failure, unless somebody did."""
        failure = self.failure(number)
        if failure is not None and self.claim_report(number):
            _say(str(failure))

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.directory, ignore_errors=True)


class Member:
    """This process's part in a launch.

    Args:
        board: The launch directory.
        rank: Global rank of this process.
        ranks: The global ranks that this machine's launcher started.
        launcher_is_alive: Tells whether the launching process is there; None in that process itself.
        speaks: Whether an uncaught exception is printed here. Not so where the launching process raises it.
    """

    def __init__(
        self,
        board: FailureBoard,
        rank: int,
        ranks: Sequence[int],
        launcher_is_alive: Callable[[], bool] | None,
        speaks: bool = True,
    ) -> None:
        self.board = board
        self.rank = rank
        self.ranks = tuple(ranks)
        self.pid = os.getpid()
        self.number = 0
        self.interrupted = threading.Event()
        self._launcher_is_alive = launcher_is_alive
        self._ending = threading.Lock()
        self._speaks = speaks
        self._previous_hook = sys.excepthook
        self._hook = self._excepthook  # one object, so that leave() recognizes it

    def join(self) -> None:
        """Share failures from now on."""
        self.board.touch(f"joined_{self.rank}")
        sys.excepthook = self._hook
        if self._launcher_is_alive is not None:
            threading.Thread(target=self._watch, name="treadle-watch-launcher", daemon=True).start()

    def leave(self) -> None:
        """Share them no longer."""
        if sys.excepthook is self._hook:
            sys.excepthook = self._previous_hook

    def claim(self, exc: BaseException) -> bool:
        """Claim the exception as the first failure; False when another rank failed before."""
        if isinstance(exc, KeyboardInterrupt):
            self.interrupted.set()
            self.board.touch(f"interrupted_{self.rank}")
            return True
        if isinstance(exc, GeneratorExit) or (isinstance(exc, SystemExit) and exc.code in (None, 0)):
            return True
        number = self._number_of(exc)
        failure = self.board.failure(number)
        return failure is None or failure.rank == self.rank

    def _number_of(self, exc: BaseException) -> int:
        for link in _chain(exc):
            claimed = getattr(link, "_treadle_failure", None)
            if claimed is not None and claimed[0] == self.pid:
                return int(claimed[1])
        number = self.number + 1
        if lost_peer(exc):
            self._await_cause(number)
        self.number = number
        exc._treadle_failure = (self.pid, number)  # type: ignore[attr-defined]
        self.board.claim(number, Failure(self.rank, _format(exc, self.rank)))
        self.board.touch(f"failed_{number}_{self.rank}")
        return number

    def _await_cause(self, number: int) -> None:
        # Sockets close before anybody can see that their process died.
        deadline = time.monotonic() + LOST_PEER_WAIT
        while time.monotonic() < deadline and not self.board.has(f"failure_{number}"):
            if self._launcher_is_alive is not None and not self._launcher_is_alive():
                self._launcher_died()
            time.sleep(0.02)

    def _excepthook(self, kind: type[BaseException], exc: BaseException, tb: TracebackType | None) -> None:
        # A process forked from this one has no part in the launch. And torch may keep this hook beyond its end.
        if current_member() is not self:
            self._previous_hook(kind, exc, tb)
            return
        won = self.claim(exc)
        if isinstance(exc, KeyboardInterrupt):
            self.board.touch("final_interrupt")
            if self._launcher_is_alive is None:
                self._previous_hook(kind, exc, tb)
            return
        number = self._number_of(exc)
        self.board.touch(f"final_{number}")
        if won and self.board.claim_report(number):
            _say(f"rank {self.rank} failed:")
            self._previous_hook(kind, exc, tb)
        elif not won:
            self.say_stopped(number)

    def finish(self, exc: BaseException) -> None:
        """Go down with an exception that the launching process reports."""
        won = self.claim(exc)
        if not isinstance(exc, KeyboardInterrupt):
            number = self._number_of(exc)
            self.board.touch(f"final_{number}")
            if not won:
                self.say_stopped(number)

    def say_stopped(self, number: int) -> None:
        """Say once in a line that this rank stopped because another failed."""
        failure = self.board.failure(number)
        if failure is not None and self.board.touch(f"stopped_{number}_{self.rank}"):
            _say(f"rank {self.rank} stopped because rank {failure.rank} failed")

    def _watch(self) -> None:
        assert self._launcher_is_alive is not None
        final_since: float | None = None
        while True:
            if not self._launcher_is_alive():
                self._launcher_died()
            number = self.board.latest()
            failure = self.board.failure(number) if number and self.board.is_final(number, self.ranks) else None
            if failure is None or failure.rank == self.rank:
                final_since = None
            elif final_since is None:
                final_since = time.monotonic()
            else:
                grace = GRACE_FAILING if self.board.has(f"failed_{number}_{self.rank}") else GRACE_STUCK
                if time.monotonic() - final_since > grace:
                    self.say_stopped(number)
                    end_process(1)
            time.sleep(POLL_INTERVAL)

    def _launcher_died(self) -> None:
        with self._ending:  # main and watching thread may both come here
            if self.board.touch("launcher_died"):
                who = f"rank {self.ranks[0]}, the launching process," if self._speaks else "the launching process"
                _say(f"{who} died without a traceback; rank {self.rank} and the others stop")
                time.sleep(3 * POLL_INTERVAL)  # the others look at the folder before it goes
                self.board.remove()
            end_process(1)


_member: Member | None = None


def current_member() -> Member | None:
    """This process's part in a launch, None outside of one (and in processes forked from one that has)."""
    return _member if _member is not None and _member.pid == os.getpid() else None


def join_launch(member: Member) -> Member:
    """Take part in a launch: from now on failures are shared."""
    global _member
    leave_launch()
    _member = member
    member.join()
    return member


def leave_launch() -> None:
    """Be an ordinary process again, after the launch has ended."""
    global _member
    if _member is not None:
        _member.leave()
    _member = None


def claim_failure(exc: BaseException) -> bool:
    """Tell the other processes of the launch that this one failed. Call it before any clean-up.

    Returns:
        Whether this is the failure to show: True for the first process to claim, and in a run without a launch
        directory. False in a process that fails because, or after, another one did.
    """
    member = current_member()
    return True if member is None else member.claim(exc)


def first_failure() -> Failure | None:
    """The newest failure of this launch, None while there is none."""
    member = current_member()
    return None if member is None else member.board.failure(member.board.latest())


def call_guarded(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call the function, and claim the exception that leaves it.

    Raises:
        ProcessFailedError: in place of a connection error that another process caused by failing.
    """
    try:
        return function(*args, **kwargs)
    except BaseException as exc:
        failure = None if claim_failure(exc) else first_failure()
        if failure is None or not lost_peer(exc):
            raise
        raise ProcessFailedError(f"rank {failure.rank} failed first: {failure.summary}") from exc


def lost_peer(exc: BaseException) -> bool:
    """Whether the exception looks like what a process gets when another one vanishes."""
    return any(
        isinstance(link, torch.distributed.DistError)
        or (isinstance(link, (RuntimeError, OSError)) and _LOST_PEER.search(str(link)) is not None)
        for link in _chain(exc)
    )


def describe_exit(rank: int, status: int, joined: bool) -> str:
    """A sentence for a process that died without a traceback; ``status`` as in ``Popen.returncode``."""
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = "signal"
        hint = " (the kernel does that when memory runs out)" if name == "SIGKILL" else ""
        return f"rank {rank} was killed by {name} ({-status}){hint}"
    if joined:
        return f"rank {rank} ended with exit status {status} and left no traceback"
    return f"rank {rank} ended with exit status {status} before it reached the launch, where the others wait for it"


def end_process(status: int) -> None:
    """End this process now, from any thread, and take its worker processes along."""
    for child in multiprocessing.active_children():
        with contextlib.suppress(Exception):
            child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _format(exc: BaseException, rank: int) -> str:
    if isinstance(exc, SystemExit):
        return f"rank {rank} called sys.exit({exc.code!r})\n"
    return "".join(traceback.format_exception(exc))


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        yield exc
        exc = exc.__cause__ or exc.__context__


def _say(text: str) -> None:
    # One write, so that lines of several processes do not mix.
    with contextlib.suppress(Exception):
        sys.stderr.write(text if text.endswith("\n") else text + "\n")
        sys.stderr.flush()
