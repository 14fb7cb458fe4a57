"""The end of a loop in which ranks may have unequal numbers of batches: there they meet.

Such a loop, an evaluation for example, has no place for collectives: ranks without a further batch do not take part.
Where a rank is in one nevertheless, the ranks that have come to the end raise an error that says so. Without the
meeting they would go on, and the next collective of theirs would be taken for that one.
"""

from __future__ import annotations

import ast
import itertools
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from treadle_fabric.coordination import list_ranks
from treadle_fabric.errors import MisconfigurationException, ProcessFailedError
from treadle_fabric.failures import call_at_looks, current_member, notes
from treadle_fabric.failures.places import place_of_main_thread

__all__ = ["BatchMeeting"]

_made = itertools.count()
_PATIENCE = 0.5  # seconds that a rank waits before it tells the others
_HELD = 1.5  # seconds at one place in a collective, until this is told
_HELD_ELSEWHERE = 5.0  # at one place where a device may be waited for
_HELD_UNKNOWN = 10.0  # in a collective, where the backend does not number its collectives
_ANSWERS = 1.0  # seconds that the rank with the error waits for the others to say where they are

_REMEDY = (
    "Each sample is evaluated once, so that the last batches may be missing on some ranks, and a step must not "
    "talk to other ranks. Put the collective into the hook at the end of the epoch; let self.log(..., "
    "sync_dist=True) reduce values; leave dist_sync_on_step of torchmetrics objects at False, and log or "
    "compute these at the end of the epoch."
)


class BatchMeeting:
    """Lets the ranks meet after the batches of a loop. All ranks make the same number of meetings, in the same order.

    A meeting costs a few messages to the rendezvous store, and a batch costs nothing. While ranks wait for others in a
    long batch nothing happens; the thread that looks at the board tells whether a collective holds these.

    Args:
        what: What the batches are for: "validation", for errors.
    """

    def __init__(self, what: str) -> None:
        self.begun = 0
        """The batches that this rank has begun since the last meeting; the loop sets it."""
        self._what, self._number, self._generation = what, next(_made), 0
        self._collectives = 0  # before the batches
        self._since = (time.monotonic(), None)  # how long the main thread has been where, as another thread sees it
        call_at_looks(self, BatchMeeting._look)

    def open(self) -> None:
        """Say that batches follow, before the first meeting that comes after them."""
        self._collectives = _collectives_of_all()

    def come(self, which: str = "") -> None:
        """Wait for the other ranks after the last batch; every rank calls this.

        Args:
            which: Of which loader the batches were, where there are several: "of loader 1".

        Raises:
            MisconfigurationException: Another rank is in a collective of a batch, for which this rank has none left; or
                it has begun one there and has not waited for its end.
            ProcessFailedError: Another rank has come to the end of its script.
        """
        store: Any = dist.distributed_c10d._get_default_store()
        key = f"treadle/batches/{self._number}"
        all_came = f"{key}/{self._generation}/all"
        collectives = _collectives_of_all()
        numbers = {dist.get_rank(): (self.begun, collectives - self._collectives)}
        store.append(f"{key}/{self._generation}/had", f"{numbers}\n")
        if store.add(f"{key}/{self._generation}", 1) == dist.get_world_size():
            for old in ("", "/had", "/all"):
                store.delete_key(f"{key}/{self._generation - 1}{old}")
            lines = store.get(f"{key}/{self._generation}/had").decode().splitlines()
            store.set(all_came, self._explain_unmatched([ast.literal_eval(line) for line in lines], which))
        member, since, pause = current_member(), time.monotonic(), 0.0005
        while not store.check([all_came]):
            time.sleep(pause := min(2 * pause, 0.05))
            if member is not None and time.monotonic() - since > _PATIENCE:
                pause = 0.2
                mine = notes.Progress(self.begun, _sequences())
                member.board.post(notes.Done(self._number, self._generation, member.rank), mine)
                if member.board.has(notes.Blocked(self._number, self._generation)):
                    raise MisconfigurationException(self._explain(member, which))
                if gone := [rank for rank in member.board.ranks if member.board.has(notes.Ended(rank))]:
                    raise ProcessFailedError(
                        f"{list_ranks(gone)} ended in the {self._what}, and the others wait there."
                    )
        if told := store.get(all_came).decode():
            raise MisconfigurationException(told)
        self._generation += 1
        self.begun, self._collectives = 0, collectives

    def _look(self) -> None:
        """Tell the ranks that wait if a collective without them holds this one; another thread calls this."""
        member = current_member()
        if not self.begun or member is None:
            return
        frame, now = sys._current_frames().get(threading.main_thread().ident or 0), time.monotonic()
        sequences = _sequences()
        here = (id(frame), getattr(frame, "f_lasti", 0), sequences)
        since, place = self._since
        if here != place:
            self._since = now, here  # type: ignore[assignment]
        if here != place or now - since < _HELD:
            return
        where = place_of_main_thread()
        if not where.waits and now - since < _HELD_ELSEWHERE:
            return
        board, generation = member.board, self._generation
        for rank in board.ranks:
            theirs = board.read(notes.Done(self._number, generation, rank))
            if theirs is None:
                continue
            both = theirs.sequences.keys() & sequences.keys()
            if any(sequences[name] > theirs.sequences[name] for name in both) or (
                not both and where.waits and now - since > _HELD_UNKNOWN
            ):
                mine = notes.Progress(self.begun, sequences, where.stack)
                board.post(notes.Held(self._number, generation, member.rank), mine)
                board.post(notes.Blocked(self._number, generation))
                return

    def _explain_unmatched(self, told: list[dict[int, tuple[int, int]]], which: str) -> str:
        """What is wrong where ranks with more batches have begun collectives which others will not; empty if nothing.

        Args:
            told: Of each rank, how many batches and collectives it has begun.
            which: As in :meth:`come`.
        """
        found = {rank: numbers for one in told for rank, numbers in one.items()}
        batches, collectives = zip(*sorted(found.values()), strict=True)
        if len(set(batches)) == 1 or len(set(collectives)) == 1 or list(collectives) != sorted(collectives):
            return ""
        had = [f"rank {rank}: {found[rank][0]} batches, {found[rank][1]} collectives" for rank in sorted(found)]
        return (
            f"The ranks have unequal numbers of batches{f' {which}' if which else ''} in the {self._what}, and its "
            f"steps begin collectives that nothing waits for ({'; '.join(had)}). Those to which some ranks do not come "
            f"would be taken for other ones later. {_REMEDY}"
        )

    def _explain(self, member: Any, which: str) -> str:
        board, this = member.board, (self._number, self._generation)
        until = time.monotonic() + _ANSWERS
        done: dict[int, notes.Progress] = {}
        held: dict[int, notes.Progress] = {}
        while time.monotonic() < until and len(done) + len(held) < len(board.ranks):
            for found, kind in ((done, notes.Done), (held, notes.Held)):
                found |= {r: p for r in board.ranks if r not in found and (p := board.read(kind(*this, r))) is not None}
            time.sleep(0.05)
        none_left = [f"{list_ranks(r for r in done if done[r].batches == n)} had {n}" for n in _counts(done)]
        inside = [f"{list_ranks(r for r in held if held[r].batches == n)} in batch {n}" for n in _counts(held)]
        first, busy = next(iter(held.values())), [r for r in board.ranks if r not in done and r not in held]
        still = f" ({list_ranks(busy)} still in a batch)" if busy else ""
        return (
            f"The ranks have unequal numbers of batches{f' {which}' if which else ''} in the {self._what}: "
            f"{', '.join(none_left)} and {'have' if len(done) > 1 else 'has'} none left, and a collective waits for "
            f"{'them' if len(done) > 1 else 'that rank'} in the step of {', '.join(inside)}{still}:\n"
            f"{first.stack}"
            f"{_REMEDY}"
        )


def _sequences() -> dict[str, int]:
    """By name of a process group, how many collectives this rank has begun in it."""
    found: dict[str, int] = {}
    for group in list(getattr(dist.distributed_c10d._world, "pg_map", ())):
        try:
            found[group.group_name] = int(group._get_sequence_number_for_group())
        except (RuntimeError, AttributeError):  # a backend that does not count
            continue
    return found


def _collectives_of_all() -> int:
    """How many collectives of all ranks this rank has begun; 0 where the backend does not number them."""
    default = dist.group.WORLD
    return 0 if default is None else _sequences().get(default.group_name, 0)


def _counts(found: dict[int, notes.Progress]) -> list[int]:
    return sorted({progress.batches for progress in found.values()})
