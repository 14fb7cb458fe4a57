"""Go to a position by the loader's own state: a loader with ``state_dict`` and ``load_state_dict``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, final

from treadle_fabric.data.cursors.one_loader import OneLoaderCursor
from treadle_fabric.randomness import own_rng_states, set_rng_states

__all__ = ["StatefulCursor"]

_AHEAD = 4  # states kept of a loader that is drawn from before training comes to its batches, one of them to spare


@final
class StatefulCursor(OneLoaderCursor):
    """Asks the loader for its state, and gives it back.

    Where batches are asked for before training comes to them, the states before those batches are kept.

    Args:
        loader: The loader.
        rank: This process.
    """

    restores_loader = True

    def __init__(self, loader: Any, rank: int) -> None:
        super().__init__(loader, rank)
        self._before: deque[tuple[int, Any]] = deque(maxlen=_AHEAD)

    def _batches(self, skip: int, resumed: dict[str, Any], now: dict[str, Any]) -> Iterator[Any]:
        loader = self._loader
        if "loader" in resumed:
            loader.load_state_dict(resumed["loader"])
        batches = iter(loader)
        if resumed:
            set_rng_states(now)
        if not self._ahead:
            return batches if "loader" in resumed else islice(batches, skip, None)
        return self._one_ahead(batches, skip)

    def _one_ahead(self, batches: Iterator[Any], count: int) -> Iterator[Any]:
        """Keep the loader's state before each batch."""
        self._before.clear()
        while True:
            self._before.append((count, self._loader.state_dict()))
            try:
                batch = next(batches)
            except StopIteration:
                self._before.pop()
                return
            count += 1
            yield batch

    def _loader_state(self, position: int) -> dict[str, Any]:
        known = [state for count, state in self._before if count == position]
        return {"loader": known[0] if known else self._loader.state_dict()}

    def _end_loader(self, state: dict[str, Any], *, ended: bool, whole: bool) -> None:
        now = own_rng_states()
        self._loader.load_state_dict(state["loader"])
        nothing = object()
        if not ended and next(iter(self._loader), nothing) is not nothing and whole:
            self._loader.load_state_dict(state["loader"])  # it took the end of an epoch for the start of the next
            self.take_generators(state, within=False)
        set_rng_states(now)
