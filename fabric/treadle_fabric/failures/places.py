"""Where each rank was when a collective failed, and which exceptions tell of that."""

from __future__ import annotations

import itertools
import os
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence

import torch.distributed

from treadle_fabric.failures.board import Board
from treadle_fabric.failures.notes import Ended, Failed, Failure, Place, Whereabouts

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

_SHOWN = 16  # ranks at most; ranks that did not take part in the collective are shown first
_INNERMOST = 2  # frames of libraries that are shown: what the rank was waiting in
_WITHOUT_THE_USERS = 8  # the same number where no frame is the user's
_HOST_GROUP = os.path.join("treadle_fabric", "coordination", "hosts.py")  # calls a process group itself
_DEPTH = 8  # where a collective waits, one of the 8 innermost frames is torch.distributed's, or that of the host group


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
    # A download resets a connection too, and so does a data loader's worker that dies while it sends a batch.
    return any(_is_collective(frame) for frame in traceback.extract_tb(exc.__traceback__)[-_DEPTH:])


def timed_out(exc: BaseException) -> bool:
    """Whether the exception comes from a collective that reached its timeout."""
    return any(lost_peer(link) and _TIMED_OUT.search(str(link)) is not None for link in chain(exc))


def chain(exc: BaseException | None) -> Iterator[BaseException]:
    """The exception, the one that caused it, and so on."""
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        yield exc
        exc = exc.__cause__ or exc.__context__


def place_of_main_thread() -> Whereabouts:
    """Where this process's main thread is. Any thread may ask."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return _whereabouts(traceback.extract_stack(frame) if frame is not None else [])


def place_of(exc: BaseException) -> Whereabouts:
    """Where the exception was raised, with all calls that led there, also where it was caught and led to others."""
    *others, first = [link for link in chain(exc) if lost_peer(link)]
    frames = list(traceback.extract_tb(first.__traceback__))
    others = others if frames else []
    for other in reversed(others):  # whose traceback begins further out, and goes through the one that caught the last
        outer, catcher = list(traceback.extract_tb(other.__traceback__)), (frames[0].filename, frames[0].name)
        caught = [i for i, frame in enumerate(outer) if (frame.filename, frame.name) == catcher]
        frames = outer[: caught[-1]] + frames if caught else frames
    return _whereabouts(frames)


def _whereabouts(frames: Sequence[traceback.FrameSummary]) -> Whereabouts:
    return Whereabouts(any(_is_collective(frame) for frame in frames[-_DEPTH:]), "".join(_shortened(frames)))


def _is_collective(frame: traceback.FrameSummary) -> bool:
    return (
        f"torch{os.sep}distributed{os.sep}" in frame.filename
        or frame.filename.endswith(_HOST_GROUP)
        or frame.name in ("backward", "_engine_run_backward")
    )


def _libraries() -> tuple[str, ...]:
    folders = {path for name in ("stdlib", "platstdlib", "purelib", "platlib") if (path := sysconfig.get_path(name))}
    for package in ("torch", "treadle_fabric", "treadle"):  # may lie elsewhere, and the last may not be imported
        if (file := getattr(sys.modules.get(package), "__file__", None)) is not None:
            folders.add(os.path.dirname(file))
    return ("<frozen", *(os.path.join(folder, "") for folder in folders))


def _shortened(frames: Sequence[traceback.FrameSummary]) -> Iterable[str]:
    """Lines for the user's frames and for the innermost frames of libraries."""
    libraries = _libraries()
    frames = [frame for frame in frames if not frame.filename.endswith("c10d_logger.py")]  # wraps every collective
    ours = [frame for frame in frames if not frame.filename.startswith(libraries)]
    kept = {id(frame) for frame in (*ours, *frames[-(_INNERMOST if ours else _WITHOUT_THE_USERS) :])}
    for shown, group in itertools.groupby(frames, key=lambda frame: id(frame) in kept):
        if not shown:
            yield "    ...\n"
            continue
        for frame in group:
            yield f'    File "{frame.filename}", line {frame.lineno}, in {frame.name}\n'
            if frame.line:
                yield f"      {frame.line}\n"


def _place_of_crash(dump: str) -> list[traceback.FrameSummary]:
    """The main thread's frames in what :mod:`faulthandler` wrote; the main thread comes last there."""
    threads = [part for part in _CRASH_THREADS.split(dump) if "File " in part]
    lines = _CRASH_LINE.findall(threads[-1]) if threads else []
    return [traceback.FrameSummary(file, int(line), name) for file, line, name in reversed(lines)]


def describe_crash(dump: str) -> str:
    """A traceback's lines for a process that a signal such as SIGABRT ended; empty where the process left none."""
    frames = _place_of_crash(dump)
    if not frames:
        return ""
    return "Traceback (most recent call last), as the signal found it:\n" + "".join(traceback.format_list(frames))


def crashed_in_collective(dump: str) -> bool:
    """Whether the process was in a collective when a signal such as SIGABRT ended it."""
    return _whereabouts(_place_of_crash(dump)).waits


def describe_hang(board: Board, failure: Failure) -> str:
    """Text below the traceback of a failed collective: which ranks did not take part, and where each rank was."""
    ranks = board.ranks
    places = {rank: place for rank in ranks if (place := board.read(Place(failure.number, rank))) is not None}
    for rank in ranks:
        if rank not in places and (dump := board.crash(rank)):
            places[rank] = _whereabouts(_place_of_crash(dump))
    ended = {rank for rank in ranks if board.has(Ended(rank))}
    failed = {rank for rank in ranks if rank not in places and board.has(Failed(failure.number, rank))}
    absent = [rank for rank in ranks if rank in ended or (rank in places and not places[rank].waits)]
    silent = [rank for rank in ranks if rank not in ended | failed | places.keys()]
    lines = [_headline(failure, absent, silent)]
    shown = sorted(sorted(ranks, key=lambda rank: (rank not in absent, rank not in silent))[:_SHOWN])
    for rank in shown:
        if rank in ended:
            lines.append(f"  rank {rank} had come to its end, without an error\n")
        elif rank in places:
            lines.append(f"  rank {rank}{', in a collective' if places[rank].waits else ''}:\n{places[rank].stack}")
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
