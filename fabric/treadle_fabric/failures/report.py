"""What is printed of a failure: once, by the process that claims the report."""

from __future__ import annotations

import signal
import socket
import traceback
from collections.abc import Callable

from treadle_fabric.failures import grace, notes
from treadle_fabric.failures.board import Board
from treadle_fabric.failures.notes import Failure
from treadle_fabric.failures.places import crashed_in_collective, describe_crash, describe_hang
from treadle_fabric.failures.process import Process

__all__ = ["claim_death", "describe_exit", "format_exception", "report", "whereabouts"]


def report(board: Board, failure: Failure | None, process: Process, show: Callable[[], None] | None = None) -> None:
    """Print a failure, unless another process did or does; ``show`` prints the traceback instead, if given."""
    if failure is not None and board.claim_report(failure.number):
        text = str(failure)
        if show is not None:
            show()
            text = ""
        process.say(text + whereabouts(board, failure, process))
        board.post(notes.Reported(failure.number))


def whereabouts(board: Board, failure: Failure, process: Process) -> str:
    """Where each rank was when a collective failed; empty for other failures."""
    if not failure.hangs:
        return ""
    number = failure.number
    process.wait(
        lambda: all(
            board.has(notes.Place(number, rank)) or board.has(notes.Ended(rank)) or board.crash(rank) != ""
            for rank in board.ranks
        ),
        grace.PLACES_WAIT,
    )
    return describe_hang(board, failure)


def claim_death(board: Board, rank: int, sentence: str, process: Process | None, host: str | None = None) -> None:
    """Claim the failure of a rank whose process died: what a crash left behind, and a sentence.

    Args:
        board: The board.
        rank: The rank.
        sentence: What is known of its end.
        process: The process that reports the failure; None where that is done later.
        host: The host of the rank. Default: this one.
    """
    host = socket.gethostname() if host is None else host
    dump, number = board.crash(rank), board.newest() + 1
    board.claim(Failure(number, rank, describe_crash(dump) + sentence, crashed_in_collective(dump), host=host))
    board.post(notes.Final(number))
    if process is not None:
        report(board, board.failure(number), process)


def describe_exit(rank: int, status: int, joined: bool) -> str:
    """A sentence for a process that died without a traceback; ``status`` as in ``Popen.returncode``."""
    if status < 0:
        name = {one.value: one.name for one in signal.Signals}.get(-status, "signal")
        hint = " (the kernel does that when memory runs out)" if name == "SIGKILL" else ""
        return f"rank {rank} was killed by {name} ({-status}){hint}\n"
    if joined:
        return f"rank {rank} ended with exit status {status} and left no traceback\n"
    return f"rank {rank} ended with exit status {status} before it reached the launch, where the others wait for it\n"


def format_exception(exc: BaseException, rank: int) -> str:
    """The traceback of an exception, or a sentence for ``sys.exit``."""
    if isinstance(exc, SystemExit):
        return f"rank {rank} called sys.exit({exc.code!r})\n"
    return "".join(traceback.format_exception(exc))
