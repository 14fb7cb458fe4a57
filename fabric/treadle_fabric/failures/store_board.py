"""The board of processes that something else started, on one or several machines: the store at which they met."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.util
import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from treadle_fabric.coordination import is_running, this_machine, wait_with_messages
from treadle_fabric.errors import RendezvousError
from treadle_fabric.failures import grace, notes
from treadle_fabric.failures.board import Board
from treadle_fabric.failures.member import Member
from treadle_fabric.failures.membership import current_member, join_launch, leave_launch
from treadle_fabric.failures.notes import Failure

__all__ = ["StoreBoard", "join_group", "leave_group"]

_MEETING = timedelta(seconds=30)  # until rank 0 has a store for the notes
_PATIENCE = timedelta(seconds=5)  # with a store that does not answer
_RANKS_PER_SECOND = 500  # that may ask the store; more ranks ask less often
_groups = itertools.count()


class StoreBoard(Board):
    """Notes in the rendezvous store, through a connection of this board's own.

    Where a rank hosts the store and the store goes without notice, that rank has died: a failure, which each of the
    other ranks then notes for itself.

    Args:
        store: Where the ranks meet.
        key: What the names of the notes begin with.
        rank: Global rank of this process.
        world_size: The number of ranks.
    """

    has_launcher = False

    def __init__(self, store: Any, key: str, rank: int, world_size: int) -> None:
        super().__init__(range(world_size))
        self._origin = store  # where this process hosts the store, the store goes with the last reference
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

    def exists(self) -> bool:
        """False once notes can neither be left nor read."""
        return not (self._removed or self._lost)

    def write(self, name: str, text: str) -> bool:
        written = f"{self._rank}.{next(self._count)} {text}"  # so that equal texts differ
        found = self._ask(lambda: self._store.compare_set(f"{self._key}/{name}", "", written).decode())
        if found is None and not self._lost:
            return False
        return self._seen.setdefault(name, found or written) == written

    def text(self, name: str) -> str | None:
        if self._removed:
            return None
        key = f"{self._key}/{name}"
        found = self._seen.get(name)
        if found is None and self._ask(lambda: self._store.check([key])):
            found = self._ask(lambda: self._store.get(key).decode())
            if found is not None:
                found = self._seen.setdefault(name, found)
        return None if found is None else found.partition(" ")[2]

    def remove(self) -> None:
        self._removed = True

    def _connect(self, store: Any) -> None:
        self._store: Any = store.clone()
        self._store.set_timeout(_PATIENCE)

    def _ask(self, question: Callable[[], Any]) -> Any:
        with self._lock:
            for again in (False, True):
                if not self.exists():
                    return None
                try:
                    if again:
                        self._connect(self._store)
                    return question()
                except dist.DistNetworkError:
                    break
                except RuntimeError:  # the store did not answer in time
                    continue
            else:
                return None
            over = self.goes_with_process or not self._hosted_by_a_rank or notes.Over().name in self._seen
            self._removed, self._lost = over, not over
        if self._lost:
            self._note_death_of_host()
        return None

    def _note_death_of_host(self) -> None:
        # Nobody else sees what is written from here on.
        newest = self.newest()
        if not self.has(notes.Final(newest)):
            sentence = "rank 0, which held the rendezvous store, died and left no traceback\n"
            self.claim(Failure(newest + 1, 0, sentence))
            self.post(notes.Final(newest + 1))


class _Peers:
    """The processes on the same machine, of which one may die without a word.

    Args:
        member: This process's part.
    """

    def __init__(self, member: Member) -> None:
        self._member = member
        self._unknown = set(member.board.ranks) - {member.rank}
        self._pids: dict[int, int] = {}
        self._machine = this_machine()
        member.board.post(notes.Peer(member.rank), notes.ProcessIdentity(member.pid, self._machine))

    def check(self) -> None:
        """Report a process that has died."""
        rank, board = self._member.rank, self._member.board
        assert isinstance(board, StoreBoard)
        if rank != 0 and _is_hosted_by_a_rank() and board.has(notes.Over()) and board.final_failure() is None:
            board.post(notes.Released(rank))
            board.remove()  # before the store goes: torch prints a warning where it asks a store in vain
        if self._machine is None:
            return
        for rank in list(self._unknown):
            if (peer := board.read(notes.Peer(rank))) is not None:
                self._unknown.discard(rank)
                if peer.machine == self._machine:
                    self._pids[rank] = peer.pid
        for rank, pid in list(self._pids.items()):
            if not is_running(pid):
                del self._pids[rank]
                if not board.has(notes.Released(rank)) and board.exists():
                    self._member.report_death(rank)


def join_group(ends_itself: bool = True) -> None:
    """Share failures with the other ranks of the process group, unless this process's launcher sees to it.

    Args:
        ends_itself: Whether this process ends when another rank has failed. Default: True; False where what started the
            processes ends them.
    """
    if current_member() is not None or dist.get_world_size() == 1:
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store: Any = dist.distributed_c10d._get_default_store()
    key = f"treadle/failures/{next(_groups)}"
    try:
        board = StoreBoard(_store_for_notes(store, key, rank), key, rank, world_size)
    except RuntimeError:  # the rank that hosts the store has ended already
        return
    member = Member(board, rank, speaks=ends_itself, ends_itself=ends_itself)
    join_launch(member, _Peers(member).check, interval=max(grace.LOOK_INTERVAL, world_size / _RANKS_PER_SECOND))
    if multiprocessing.parent_process() is not None:  # a forked process ends without the interpreter's exit handlers
        multiprocessing.util.Finalize(None, _leave_at_the_end, exitpriority=-10)


def _store_for_notes(store: Any, key: str, rank: int) -> Any:
    """A store of its own where a rank hosts the rendezvous store: that one goes when a script destroys its group."""
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

    def describe(seconds: float) -> str:
        return (
            f"rank {rank} has waited {seconds:.0f} s for rank 0, which met the others at {inner.host}:{inner.port}, to "
            "say where the ranks tell one another of failures."
        )

    if not wait_with_messages(lambda: bool(store.check([f"{key}/port"])), describe, _MEETING.total_seconds()):
        raise RendezvousError("rank 0 did not say where the ranks tell one another of failures")
    return c10d.TCPStore(inner.host, int(store.get(f"{key}/port")), None, False, _MEETING)


def _leave_at_the_end() -> None:
    member, exc = current_member(), sys.exc_info()[1]
    if member is not None and exc is not None and member.claim(exc) and not isinstance(exc, SystemExit):
        member.board.claim_report(member.board.newest())  # multiprocessing prints it, without the hook
    leave_group()


def leave_group() -> None:
    """Share failures no longer, what :func:`join_group` began; to be called before the process group is destroyed."""
    member = current_member()
    if member is None or not isinstance(member.board, StoreBoard):
        return
    board = member.board
    if not member.failed:
        board.post(notes.Ended(member.rank))
    board.post(notes.Released(member.rank))
    if board.goes_with_process:
        board.post(notes.Over())
        member.await_release(grace.RELEASE_WAIT if board.final_failure() is None else grace.BOARD_STAYS)
    leave_launch()


def _is_hosted_by_a_rank() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # or torchrun hosts it
