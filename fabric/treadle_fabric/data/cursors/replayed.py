"""Go to a position by drawing everything before it again: streams, iterables of the user's own, combined loaders."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any, final

from torch.utils.data import DataLoader, IterableDataset

from treadle_fabric.data.cursors.one_loader import OneLoaderCursor
from treadle_fabric.data.cursors.seeded import SeededStream
from treadle_fabric.data.samplers import end_workers, index_sampler, with_sampler
from treadle_fabric.data.streams import is_stream, warn_of_draws
from treadle_fabric.randomness import (
    PrivateRandomness,
    as_own_rng_states,
    own_rng_states,
    same_rng_states,
    set_rng_states,
)

__all__ = ["ReplayedCursor"]

_CHUNK = 16  # batches drawn with one change of the random state
_CLOSELY = 8  # batches at the beginning of an epoch that are all watched
_AHEAD = 4  # random states kept where batches are drawn before training comes to them, one of them to spare
_NOTHING: Any = object()


@final
class ReplayedCursor(OneLoaderCursor):
    """Iterates the loader from its beginning.

    A stream shares the global generators with training, as in a loop without this class: it is drawn again from the
    random states that the epoch began with, and then goes on with the states of the checkpoint. That is exact unless
    the stream draws for each batch and keeps something of what it drew, which the user is told.
    Any other loader has random numbers of its own, so that training may draw any others.

    Args:
        loader: The loader.
        rank: This process.
    """

    def __init__(self, loader: Any, rank: int) -> None:
        super().__init__(loader, rank)
        self._stream: SeededStream | None = None
        if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset) and loader.persistent_workers:
            self._stream = SeededStream(loader.dataset)
            self._loader = with_sampler(loader, index_sampler(loader), dataset=self._stream)
        self._shares = self._shares_now = is_stream(loader)
        """Whether the loader draws from the global generators; and in this epoch, which may be of an old checkpoint."""
        self._before: deque[tuple[int, dict[str, Any]]] = deque(maxlen=_AHEAD)
        """The random states before the newest batches, where each is drawn before training comes to it."""
        self._watched: float = 1
        """The next batch before and after which the random states are compared."""
        self._draws = self._told = self._ended = False

    def _batches(self, skip: int, resumed: dict[str, Any], now: dict[str, Any]) -> Iterator[Any]:
        if self._stream is not None:
            self._stream.begin(self._key)
        self._shares_now = resumed.get("shares", False) if resumed else self._shares
        if not self._shares_now:
            return self._apart(skip)
        self._watch(1)
        self._before.clear()
        self._ended = False
        if not resumed:
            return self._shared(iter(self._loader), 0, [])
        before = [as_own_rng_states(states, self._rank) for states in resumed.get("before", [])]
        return self._shared_again(skip, before, now)

    def _apart(self, skip: int) -> Iterator[Any]:
        """The batches after the first ``skip``, drawn from private random states."""
        private = PrivateRandomness(self._key)
        iterator, _ = private.take(lambda: iter(self._loader), 0)
        while skip > 0:
            private.take(iterator, min(skip, _CHUNK))
            skip -= _CHUNK
        while batch := private.take(iterator, 1)[1]:
            yield batch[0]

    def _shared(self, batches: Iterator[Any], number: int, drawn: list[Any]) -> Iterator[Any]:
        """Batches drawn from the global generators, whose states are compared before and after some of the batches.

        Args:
            batches: What is not drawn yet.
            number: The number of the first batch.
            drawn: The first batches, where they are drawn already.
        """
        yield from drawn
        number += len(drawn)
        before: dict[str, Any] = {}
        while True:
            watches = number >= self._watched
            if watches or self._ahead:
                before = own_rng_states()
                if self._ahead:
                    self._before.append((number, before))
            batch = next(batches, _NOTHING)
            if watches:
                self._watch(number + 1 if number + 1 < _CLOSELY else 1 << number.bit_length())
                self._compare(before, own_rng_states())
            if batch is _NOTHING:
                break
            number += 1
            yield batch
        self._ended = True

    def _shared_again(self, skip: int, before: list[dict[str, Any]], now: dict[str, Any]) -> Iterator[Any]:
        """The same, after the first ``skip`` were drawn again from the random states that the epoch began with.

        Args:
            skip: The number of batches to leave out at the beginning.
            before: The random states before each batch after those that had been drawn when the checkpoint was saved.
            now: The random states when it was saved.
        """
        set_rng_states(self._rng)
        batches = iter(self._loader)
        _skip(batches, min(skip, 1))
        first = own_rng_states()
        _skip(batches, skip - 1)
        again = own_rng_states()
        if not same_rng_states(again, before[0] if before else now):
            self._compare(first, again)
            if self._draws and not self._told:
                self._told = True
                warn_of_draws(self._loader)
        drawn = []
        for number, states in enumerate(before, skip):
            set_rng_states(states)
            self._before.append((number, states))
            drawn += [batch] if (batch := next(batches, _NOTHING)) is not _NOTHING else []
        set_rng_states(now)
        return self._shared(batches, skip, drawn)

    def _compare(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Note whether batches were drawn from the global generators."""
        if not same_rng_states(before, after):
            self._draws, self._watched = True, math.inf

    def _watch(self, number: int) -> None:
        """Compare the random states around the batch of this number, unless it is known that the loader draws."""
        self._watched = math.inf if self._draws else number

    def _loader_state(self, position: int) -> dict[str, Any]:
        if not self._shares_now:
            return {}
        self._watch(0)  # the next one
        before = [states for number, states in self._before if number >= position]
        return {"shares": True, "before": before, "draws": self._draws and not (self._ended or self._told)}

    def close(self) -> None:
        if self._stream is not None:
            end_workers(self._loader)


def _skip(batches: Iterator[Any], number: int) -> None:
    """Leave batches out; an iterator of the user's own may begin anew when it is asked for its iterator again."""
    for _ in range(number):
        next(batches, _NOTHING)
