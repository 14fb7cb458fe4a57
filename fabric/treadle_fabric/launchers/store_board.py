"""The board of processes that something else started, which may be on several machines: the store that they met at."""

from __future__ import annotations

import itertools
import os
import threading
import time
from datetime import timedelta
from typing import Any, TextIO

import torch.distributed as dist

from treadle_fabric.launchers.board import Board
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

_PATIENCE = timedelta(seconds=5)  # with a store that does not answer
_RANKS_PER_SECOND = 500  # that may ask the store; more of them ask less often
_made = itertools.count()


class StoreBoard(Board):
    """Notes in the rendezvous store, through a connection of its own. When the store goes, there are none any more.

    Args:
        store: the process group's.
        key: what the notes' names begin with.
        rank: this process's.
    """

    def __init__(self, store: Any, key: str, rank: int) -> None:
        self._store = store.clone()
        self._store.set_timeout(_PATIENCE)
        self._key = key
        self._rank = rank
        self._count = itertools.count()
        self._lock = threading.Lock()
        self._gone = False

    def post(self, name: str, text: str = "") -> bool:
        note = f"{self._rank}.{next(self._count)} {text}"  # so that equal texts differ
        stands = self._ask(lambda: self._store.compare_set(f"{self._key}/{name}", "", note).decode())
        return bool(stands == note)

    def read(self, name: str) -> str | None:
        if not self.has(name):
            return None
        found = self._ask(lambda: self._store.get(f"{self._key}/{name}").decode())
        return None if found is None else str(found).partition(" ")[2]

    def has(self, name: str) -> bool:
        return bool(self._ask(lambda: self._store.check([f"{self._key}/{name}"])))

    def exists(self) -> bool:
        return not self._gone

    def remove(self) -> None:
        self._gone = True

    def crash_log(self, rank: int) -> TextIO | None:
        return None

    def _ask(self, question: Any) -> Any:
        with self._lock:
            if self._gone:
                return None
            try:
                return question()
            except RuntimeError:  # the store went with its process
                self._gone = True
                return None


class _Peers:
    """The processes of the same machine, of which one may die without a word."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._unknown = set(range(world_size)) - {rank}
        self._pids: dict[int, int] = {}
        self._here = _machine()

    def check(self, member: Member) -> None:
        """Report the one that has died."""
        if _is_hosted_by_a_rank() and member.board.has("ended_0"):
            member.board.remove()  # before it goes: torch prints a warning where it asks a store in vain
        if self._here is None:
            return
        for rank in list(self._unknown):
            if (note := member.board.read(f"peer_{rank}")) is not None:
                self._unknown.discard(rank)
                pid, _, machine = note.partition(" ")
                if machine == self._here:
                    self._pids[rank] = int(pid)
        for rank, process in list(self._pids.items()):
            if not _runs(process):
                del self._pids[rank]
                if not member.board.has(f"ended_{rank}") and member.board.exists():
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
    board = StoreBoard(store, f"treadle/failures/{next(_made)}", rank)
    peers = _Peers(rank, world_size)
    interval = max(POLL_INTERVAL, world_size / _RANKS_PER_SECOND)
    member = Member(board, rank, range(world_size), lambda: True, look=peers.check, interval=interval)
    board.post(f"peer_{rank}", f"{os.getpid()} {_machine()}")
    join_launch(member)


def leave_group() -> None:
    """The end of what :func:`join_group` began; before the process group's."""
    member = current_member()
    if member is None or not isinstance(member.board, StoreBoard):
        return
    member.board.post(f"ended_{member.rank}", ENDED)
    if member.rank == 0 and _is_hosted_by_a_rank():
        time.sleep(min(GRACE_STUCK, 3 * member.interval))  # the store goes with this process: until the others know
    leave_launch()


def _is_hosted_by_a_rank() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # or torchrun has it
