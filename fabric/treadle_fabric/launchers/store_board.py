"""The board of processes that something else started, which may be on several machines: the store that they met at."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import multiprocessing.util
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any, TextIO

import torch.distributed as dist

from treadle_fabric.launchers.board import Board, Failure
from treadle_fabric.launchers.failures import (
    ENDED,
    GRACE_STUCK,
    POLL_INTERVAL,
    Member,
    current_member,
    join_launch,
    leave_launch,
    report_death,
)

__all__ = ["StoreBoard", "join_group", "leave_group"]

_MEETING = timedelta(seconds=30)  # until rank 0 has a store for the notes
_PATIENCE = timedelta(seconds=5)  # with a store that does not answer
_OVER_WAIT = 30.0  # for a rank that has yet to learn that the store goes, or it would take the host for dead
_RANKS_PER_SECOND = 500  # that may ask the store; more of them ask less often
_made = itertools.count()


class StoreBoard(Board):
    """Notes in the rendezvous store, through a connection of its own.

    Where a rank hosts the store and it goes without notice, that rank has died: this is then a failure that the others
    note each for itself.

    Args:
        store: where the ranks meet.
        key: what the notes' names begin with.
        rank: this process's.
    """

    has_launcher = False

    def __init__(self, store: Any, key: str, rank: int) -> None:
        self._origin = store  # where this process hosts it, it goes with the last reference
        self._connect(store)
        self._key = key
        self._rank = rank
        self._hosted_by_a_rank = _is_hosted_by_a_rank()
        self.goes_with_process = rank == 0 and self._hosted_by_a_rank
        self._count = itertools.count()
        self._lock = threading.Lock()
        self._seen: dict[str, str] = {}  # notes do not change, and are there still when the store is not
        self._removed = False
        self._lost = False

    def post(self, name: str, text: str = "") -> bool:
        note = f"{self._rank}.{next(self._count)} {text}"  # so that equal texts differ
        stands = self._ask(lambda: self._store.compare_set(f"{self._key}/{name}", "", note).decode())
        if stands is None:
            if not self._lost:
                return False
            stands = note
        return self._seen.setdefault(name, stands) == note

    def read(self, name: str) -> str | None:
        note = self._find(name)
        return None if note is None else note.partition(" ")[2]

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def exists(self) -> bool:
        return not (self._removed or self._lost)

    def remove(self) -> None:
        self._removed = True

    def crash_log(self, rank: int) -> TextIO | None:
        return None

    def _find(self, name: str) -> str | None:
        if self._removed:
            return None
        key = f"{self._key}/{name}"
        note = self._seen.get(name)
        if note is None and self._ask(lambda: self._store.check([key])):
            note = self._ask(lambda: self._store.get(key).decode())
            if note is not None:
                note = self._seen.setdefault(name, note)
        return note

    def _connect(self, store: Any) -> None:
        connected = store.clone()
        connected.set_timeout(_PATIENCE)
        self._store: Any = connected

    def _ask(self, question: Callable[[], Any]) -> Any:
        with self._lock:
            for again in (False, True):
                if not self.exists():
                    return None
                try:
                    if again:
                        self._connect(self._store)
                    return question()
                except dist.DistNetworkError:  # the store went with its process
                    self._lose()
                except RuntimeError:  # it did not answer in time
                    continue
            return None

    def _lose(self) -> None:
        if self.goes_with_process or not self._hosted_by_a_rank or "over" in self._seen:
            self._removed = True
            return
        number = 1
        while f"failure_{number}" in self._seen:
            number += 1
        if f"final_{number - 1}" not in self._seen:
            died = Failure(0, "rank 0, which held the rendezvous store, died and left no traceback\n")
            self._seen[f"failure_{number}"] = f"0 {json.dumps(asdict(died))}"
            self._seen[f"final_{number}"] = "0 "
        self._lost = True


class _Peers:
    """The processes of the same machine, of which one may die without a word."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._unknown = set(range(world_size)) - {rank}
        self._pids: dict[int, int] = {}
        self._here = _machine()

    def check(self, member: Member) -> None:
        """Report the one that has died."""
        board = member.board
        if member.rank != 0 and _is_hosted_by_a_rank() and board.has("over") and not _stands(member):
            board.post(f"released_{member.rank}")
            board.remove()  # before it goes: torch prints a warning where it asks a store in vain
        if self._here is None:
            return
        for rank in list(self._unknown):
            if (note := board.read(f"peer_{rank}")) is not None:
                self._unknown.discard(rank)
                pid, _, machine = note.partition(" ")
                if machine == self._here:
                    self._pids[rank] = int(pid)
        for rank, process in list(self._pids.items()):
            if not _runs(process):
                del self._pids[rank]
                if not board.has(f"released_{rank}") and board.exists():
                    report_death(member, rank)


def _machine() -> str | None:
    """The same for processes that see one another's process ids; None where that cannot be told."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def join_group() -> None:
    """Share failures with the other ranks of the process group, unless this process's launcher sees to it."""
    if current_member() is not None or dist.get_world_size() == 1:
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store: Any = dist.distributed_c10d._get_default_store()
    key = f"treadle/failures/{next(_made)}"
    try:
        board = StoreBoard(_store_for_notes(store, key, rank), key, rank)
    except RuntimeError:  # the rank that hosts the store has ended already
        return
    peers = _Peers(rank, world_size)
    interval = max(POLL_INTERVAL, world_size / _RANKS_PER_SECOND)
    member = Member(board, rank, range(world_size), lambda: True, look=peers.check, interval=interval)
    board.post(f"peer_{rank}", f"{os.getpid()} {_machine()}")
    join_launch(member)
    if multiprocessing.parent_process() is not None:  # one that was forked ends without the interpreter's exit handlers
        multiprocessing.util.Finalize(None, _leave_at_the_end, exitpriority=-10)


def _store_for_notes(store: Any, key: str, rank: int) -> Any:
    """One of its own where a rank hosts the rendezvous store, which goes when the script destroys its process group."""
    c10d: Any = dist
    inner = store
    while isinstance(inner, c10d.PrefixStore):
        inner = inner.underlying_store
    if not _is_hosted_by_a_rank() or not isinstance(inner, c10d.TCPStore):
        return store
    if rank == 0:
        own = c10d.TCPStore(inner.host, 0, None, True, _MEETING, wait_for_workers=False)
        store.set(f"{key}/port", str(own.port))
        return own
    store.wait([f"{key}/port"], _MEETING)
    return c10d.TCPStore(inner.host, int(store.get(f"{key}/port")), None, False, _MEETING)


def _leave_at_the_end() -> None:
    member, exc = current_member(), sys.exc_info()[1]
    if member is not None and exc is not None and member.claim(exc) and not isinstance(exc, SystemExit):
        member.board.claim_report(member.number)  # multiprocessing prints it, without the hook
    leave_group()


def leave_group() -> None:
    """The end of what :func:`join_group` began; before the process group's."""
    member = current_member()
    if member is None or not isinstance(member.board, StoreBoard):
        return
    board = member.board
    if not member.failed:
        board.post(f"ended_{member.rank}", ENDED)
    board.post(f"released_{member.rank}")
    if board.goes_with_process:
        board.post("over")
        member.await_release(GRACE_STUCK + 1 if _stands(member) else _OVER_WAIT)
    leave_launch()


def _stands(member: Member) -> bool:
    number = member.board.latest()
    return number > 0 and member.board.is_final(number, member.ranks)


def _is_hosted_by_a_rank() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # or torchrun has it
