"""Where each rank was when a collective failed."""

from __future__ import annotations

import json
import os
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence

import torch.distributed

from treadle_fabric.launchers.board import Board, Failure

__all__ = [
    "chain",
    "crashed_in_collective",
    "describe_crash",
    "describe_hang",
    "lost_peer",
    "place_of",
    "place_of_main_thread",
    "timed_out",
]

_LOST_PEER = re.compile(
    r"gloo|nccl|tcpstore|socket|recvvalue|connection (closed|reset|refused)|broken pipe", re.IGNORECASE
)
_OF_THE_LIBRARY = re.compile(r"gloo/|\[gloo\]|ProcessGroup(Gloo|NCCL)|NCCL error|nccl(Remote|System)Error")
_TIMED_OUT = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
_SET_TIMEOUT = re.compile(r"waiting (\d+) ?ms|Timeout\(ms\)=(\d+)|after (\d+)ms", re.IGNORECASE)
_CRASH_LINE = re.compile(r'File "([^"]*)", line (\d+) in (.*)')
_CRASH_THREADS = re.compile(r"^(?=Thread |Current thread )", re.MULTILINE)

_SHOWN = 16  # ranks; those that did not come are the first to be shown
_INNERMOST = 2  # frames of libraries that are shown: what the rank was waiting in
_WITHOUT_THE_USERS = 8  # as many where no frame is the user's
_DEPTH = 8  # of the innermost frames, one is torch.distributed's where a collective waits


def lost_peer(exc: BaseException) -> bool:
    """Whether the exception looks like what a process gets when another one vanishes or does not come."""
    return any(
        isinstance(link, torch.distributed.DistError)
        or (
            isinstance(link, (RuntimeError, OSError))
            and _LOST_PEER.search(str(link)) is not None
            and (_OF_THE_LIBRARY.search(str(link)) is not None or _was_in_collective(link))
        )
        for link in chain(exc)
    )


def _was_in_collective(exc: BaseException) -> bool:
    # A download, or a data loader's worker that dies while it sends a batch, resets a connection, too.
    return any(_is_collective(frame) for frame in traceback.extract_tb(exc.__traceback__)[-_DEPTH:])


def timed_out(exc: BaseException) -> bool:
    """Whether it comes of a collective that waited as long as it may."""
    return any(lost_peer(link) and _TIMED_OUT.search(str(link)) is not None for link in chain(exc))


def chain(exc: BaseException | None) -> Iterator[BaseException]:
    """The exception and what caused it."""
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        yield exc
        exc = exc.__cause__ or exc.__context__


def place_of_main_thread() -> str:
    """Where this process's main thread is, as a note for the board. Any thread may ask."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return _note(traceback.extract_stack(frame)) if frame is not None else _note([])


def place_of(exc: BaseException) -> str:
    """Where the exception was raised, as a note for the board."""
    first = [link for link in chain(exc) if lost_peer(link)][-1]
    return _note(traceback.extract_tb(first.__traceback__))


def _note(frames: Sequence[traceback.FrameSummary]) -> str:
    waits = any(_is_collective(frame) for frame in frames[-_DEPTH:])
    return json.dumps({"waits": waits, "stack": "".join(_shortened(frames))})


def _is_collective(frame: traceback.FrameSummary) -> bool:
    return f"torch{os.sep}distributed{os.sep}" in frame.filename or frame.name in ("backward", "_engine_run_backward")


def _libraries() -> tuple[str, ...]:
    folders = {path for name in ("stdlib", "platstdlib", "purelib", "platlib") if (path := sysconfig.get_path(name))}
    for package in ("torch", "treadle_fabric", "treadle"):  # may be elsewhere, and the last is only there if it is used
        if (file := getattr(sys.modules.get(package), "__file__", None)) is not None:
            folders.add(os.path.dirname(file))
    return ("<frozen", *(os.path.join(folder, "") for folder in folders))


def _shortened(frames: Sequence[traceback.FrameSummary]) -> Iterable[str]:
    """The user's frames and the innermost ones of libraries."""
    libraries = _libraries()
    frames = [frame for frame in frames if not frame.filename.endswith("c10d_logger.py")]  # wraps every collective
    ours = [frame for frame in frames if not frame.filename.startswith(libraries)]
    kept = {id(frame) for frame in (*ours, *frames[-(_INNERMOST if ours else _WITHOUT_THE_USERS) :])}
    skipped = False
    for frame in frames:
        if id(frame) not in kept:
            skipped = True
            continue
        if skipped:
            yield "    ...\n"
        skipped = False
        yield f'    File "{frame.filename}", line {frame.lineno}, in {frame.name}\n'
        if frame.line:
            yield f"      {frame.line}\n"


def _place_of_crash(dump: str) -> list[traceback.FrameSummary]:
    """The main thread's frames in what :mod:`faulthandler` wrote; it comes last there."""
    threads = [part for part in _CRASH_THREADS.split(dump) if "File " in part]
    lines = _CRASH_LINE.findall(threads[-1]) if threads else []
    return [traceback.FrameSummary(file, int(line), name) for file, line, name in reversed(lines)]


def describe_crash(dump: str | None) -> str:
    """A traceback's lines for a process that a signal like SIGABRT ended; empty where it left none."""
    frames = _place_of_crash(dump) if dump else []
    if not frames:
        return ""
    return "Traceback (most recent call last), as the signal found it:\n" + "".join(traceback.format_list(frames))


def crashed_in_collective(dump: str | None) -> bool:
    """Whether the process was in a collective when a signal like SIGABRT ended it."""
    return any(_is_collective(frame) for frame in _place_of_crash(dump)[-_DEPTH:]) if dump else False


def describe_hang(board: Board, number: int, failure: Failure, ranks: Sequence[int]) -> str:
    """What to say below the traceback of a failed collective: which ranks did not come, and where each one was."""
    notes = {rank: json.loads(text) for rank in ranks if (text := board.read(f"place_{number}_{rank}")) is not None}
    ended = {rank: text for rank in ranks if (text := board.read(f"ended_{rank}")) is not None}
    for rank in ranks:
        if rank not in notes and (dump := board.read(f"crash_{rank}")):
            notes[rank] = json.loads(_note(_place_of_crash(dump)))
    absent = [rank for rank in ranks if rank in ended or (rank in notes and not notes[rank]["waits"])]
    failed = {rank for rank in ranks if rank not in notes and board.has(f"failed_{number}_{rank}")}
    silent = [rank for rank in ranks if rank not in ended and rank not in notes and rank not in failed]
    lines = [_headline(failure, absent, silent)]
    shown = sorted(sorted(ranks, key=lambda rank: (rank not in absent, rank not in silent))[:_SHOWN])
    for rank in shown:
        if rank in ended:
            lines.append(f"  rank {rank} {ended[rank]}\n")
        elif rank in notes:
            lines.append(f"  rank {rank}{', in a collective' if notes[rank]['waits'] else ''}:\n{notes[rank]['stack']}")
        else:
            lines.append(f"  rank {rank} {'failed, too' if rank in failed else 'did not answer'}\n")
    if len(shown) < len(ranks):
        lines.append(f"  and {len(ranks) - len(shown)} more\n")
    return "".join(lines)


def _headline(failure: Failure, absent: Sequence[int], silent: Sequence[int]) -> str:
    parts = [f"{_ranks(absent)} did not take part in it."] if absent else []
    if silent:
        parts.append(f"{_ranks(silent)} did not answer.")
    who = " ".join(parts) or "All ranks were in collectives, but not in the same one."
    if failure.status != 1:  # it was ended, whatever it was doing
        return "Where each rank was:\n"
    if not _TIMED_OUT.search(failure.summary):
        return f"\nA collective failed. {who} Where each rank was:\n"
    found = _SET_TIMEOUT.search(failure.summary)
    seconds = f" of {int(next(filter(None, found.groups()))) / 1000:g} s" if found else ""
    return (
        f"\nA collective ran into the timeout{seconds}. {who} Every rank has to call each collective; if one only "
        "needs longer, raise the timeout: strategy=DDPStrategy(timeout=timedelta(minutes=...)).\nWhere each rank was:\n"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"Rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
