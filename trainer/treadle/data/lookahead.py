"""Fetch one batch ahead, so that the last batch is known as the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

__all__ = ["BatchIterator", "Lookahead", "Transfer"]

Transfer = Callable[[Any, int], Any]


class Lookahead:
    """Iterates over triples: the number of a batch, the batch, and whether it is known to be the last one.

    The last batch is found by its number, or by fetching one batch ahead.

    Args:
        batches: what to iterate.
        start: the number of the first batch.
        stop: the number before which iteration ends; infinity for no end.
        what: names the batches in errors, "of epoch 3 from the training loader" say.
        ahead: called with the number of a batch; tells whether to fetch one batch ahead, to know the last.
            None: each batch is fetched when it is asked for. Where batches end before ``stop`` and none was fetched
            ahead, the last one was not known as the last.
        drain: ask for one more batch in the end, so that samplers come to their end.
        agree: on several ranks that fetch ahead: called with a number, and whether this rank has a batch of that
            number; tells whether all ranks do.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        start: int,
        stop: float,
        what: str,
        *,
        ahead: Callable[[int], bool] | None = None,
        drain: bool = False,
        agree: Callable[[int, bool], bool] | None = None,
    ) -> None:
        self._batches, self._next, self._stop, self._ahead, self._drain = batches, start, stop, ahead, drain
        self._what, self._agree = what, agree

    def __iter__(self) -> Iterator[tuple[int, Any, bool]]:
        index, stop, batches = self._next, self._stop, self._batches
        if self._ahead is not None:
            yield from self._one_ahead(self._ahead)
            return
        last = stop - 1
        while index < stop:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                self._locate(error, index)
                raise
            yield index, batch, index == last
            index += 1
        if self._drain:
            with suppress(Exception):  # nobody needs the batch, and some loaders fail beyond the length that they tell
                next(batches, None)

    def _one_ahead(self, ahead: Callable[[int], bool]) -> Iterator[tuple[int, Any, bool]]:
        index, agree = self._next, self._agree
        more, batch = self._fetch(index)
        if agree is not None:
            more = agree(index, more)
        while more:
            late = not ahead(index)
            if late:
                yield index, batch, index + 1 >= self._stop
            more, following = self._fetch(index + 1)
            if agree is not None:
                more = agree(index + 1, more)
            if not late:
                yield index, batch, not more
            batch, index = following, index + 1

    def _fetch(self, index: int) -> tuple[bool, Any]:
        if index >= self._stop:
            return False, None
        try:
            return True, next(self._batches)
        except StopIteration:
            return False, None
        except Exception as error:
            self._locate(error, index)
            raise

    def _locate(self, error: Exception, index: int) -> None:
        error.add_note(f"This came while batch {index} {self._what} was loaded.")


class BatchIterator:
    """The ``dataloader_iter`` of a step: iterates over triples: the batch on the device, batch_idx, dataloader_idx."""

    def __init__(self, batches: Iterable[tuple[int, Any, bool]], transfer: Transfer, dataloader_idx: int = 0) -> None:
        self._batches = iter(batches)
        self._transfer = transfer
        self._dataloader_idx = dataloader_idx
        self.batch: Any = None
        self._fetched: tuple[int, Any, bool] | None = None

    @property
    def done(self) -> bool:
        """Whether nothing is left."""
        if self._fetched is None:
            self._fetched = next(self._batches, None)
        return self._fetched is None

    def steps(self) -> Iterator[tuple[int, BatchIterator, bool]]:
        """One triple a step, as :class:`Lookahead` gives; the step itself draws the batches from this object."""
        while not self.done:
            assert self._fetched is not None
            index, _, is_last = self._fetched  # a step draws one batch
            yield index, self, is_last

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> tuple[Any, int, int]:
        if self.done:
            raise StopIteration
        assert self._fetched is not None
        (index, batch, _), self._fetched = self._fetched, None
        self.batch = self._transfer(batch, self._dataloader_idx)
        return self.batch, index, self._dataloader_idx
