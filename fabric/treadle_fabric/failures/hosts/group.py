"""What a process does when it joins a process group, and when it leaves it."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.util
import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from treadle_fabric.coordination import wait_with_messages
from treadle_fabric.errors import RendezvousError
from treadle_fabric.failures import grace, notes
from treadle_fabric.failures.hosts.lines import Lines
from treadle_fabric.failures.hosts.linked_board import LinkedBoard
from treadle_fabric.failures.hosts.peers import Peers
from treadle_fabric.failures.member import Member
from treadle_fabric.failures.membership import current_member, join_launch, leave_launch
from treadle_fabric.failures.store_board import StoreBoard, is_hosted_by_a_rank

__all__ = ["join_group", "leave_group"]

_MEETING = timedelta(seconds=30)  # until rank 0 has a store for the notes
_RANKS_PER_SECOND = 500  # that may ask the store; more ranks ask less often
_groups = itertools.count()
_lines: Lines | None = None


def join_group(num_nodes: int = 1, local_rank: int = 0, collects_output: bool = True, ends_itself: bool = True) -> None:
    """Share failures with the other ranks of the process group, unless this process's launcher sees to all of them.

    Args:
        num_nodes: The number of hosts.
        local_rank: This process's rank among those on its host.
        collects_output: Whether what all hosts print comes together in one place.
        ends_itself: Whether this process ends when another rank has failed. Default: True; False where what started the
            processes ends them.
    """
    global _lines
    member = current_member()
    launched = None if member is None else member.board
    if dist.get_world_size() == 1 or not (launched is None or isinstance(launched, LinkedBoard)):
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store: Any = dist.distributed_c10d._get_default_store()
    key = f"treadle/failures/{next(_groups)}"
    try:
        board = StoreBoard(_store_for_notes(store, key, rank), key, rank, world_size, collects_output)
    except RuntimeError:  # the rank that hosts the store has ended already
        return
    if member is None or launched is None:
        member = Member(board, rank, speaks=ends_itself, ends_itself=ends_itself)
        peers = Peers(member, board)
        join_launch(member, peers.check, interval=max(grace.LOOK_INTERVAL, world_size / _RANKS_PER_SECOND))
        if (
            multiprocessing.parent_process() is not None
        ):  # a forked process ends without the interpreter's exit handlers
            multiprocessing.util.Finalize(None, _leave_at_the_end, exitpriority=-10)
    else:
        launched.link(board)
        board.post(notes.Joined(rank))
        peers = Peers(member, board)
        member.answers.append(peers.answer)
    if num_nodes > 1 and local_rank == 0:
        inner = _innermost(store)
        if isinstance(inner, dist.TCPStore):  # type: ignore[attr-defined]
            _lines = Lines(member, board, store, key, (inner.host, inner.port))
            member.answers.append(_lines.look)


def _store_for_notes(store: Any, key: str, rank: int) -> Any:
    """A store of its own where a rank hosts the rendezvous store: that one goes when a script destroys its group."""
    c10d: Any = dist
    inner = _innermost(store)
    if not is_hosted_by_a_rank() or not isinstance(inner, c10d.TCPStore):
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


def _innermost(store: Any) -> Any:
    while isinstance(store, dist.PrefixStore):  # type: ignore[attr-defined]
        store = store.underlying_store
    return store


def _leave_at_the_end() -> None:
    member, exc = current_member(), sys.exc_info()[1]
    if member is not None and exc is not None and member.claim(exc) and not isinstance(exc, SystemExit):
        member.board.claim_report(member.board.newest())  # multiprocessing prints it, without the hook
    leave_group()


def leave_group() -> None:
    """Share failures no longer, what :func:`join_group` began; to be called before the process group is destroyed."""
    global _lines
    member = current_member()
    if member is None:
        return
    launched = member.board
    board = launched.store if isinstance(launched, LinkedBoard) else launched
    if not isinstance(board, StoreBoard):
        return
    if not member.failed:
        board.post(notes.Ended(member.rank))
    board.post(notes.Released(member.rank))
    if board.goes_with_process:
        board.post(notes.Over())
        member.await_release(grace.RELEASE_WAIT if board.final_failure() is None else grace.BOARD_STAYS)
    if _lines is not None:
        _lines.close()
        _lines = None
    if isinstance(launched, LinkedBoard):
        launched.unlink()
    else:
        leave_launch()
