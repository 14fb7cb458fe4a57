"""The items of a CombinedLoader from any position on, where each of its loaders can skip by index arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from treadle_fabric.data.combined.loader import CombinedLoader
from treadle_fabric.data.cursors.cursor import Cursor
from treadle_fabric.data.samplers import sized_len
from treadle_fabric.errors import CheckpointMismatchError

__all__ = ["CombinedCursor", "make_cursor"]


def make_cursor(loader: Any, rank: int, *, exact: bool) -> Cursor | CombinedCursor:
    """What iterates a training loader; the arguments are those of :class:`Cursor`."""
    if exact and isinstance(loader, CombinedLoader) and None not in map(sized_len, loader.flattened):
        parts = [Cursor(part, rank, among_others=True) for part in loader.flattened]
        if all(part.skips_by_index for part in parts):
            return CombinedCursor(loader, parts)
    return Cursor(loader, rank, exact=exact)


class CombinedCursor:
    """Iterates a CombinedLoader from a position, as :class:`Cursor` does with one loader.

    Args:
        combined: says when which of its loaders is drawn from.
        parts: a cursor for each of these.
    """

    def __init__(self, combined: CombinedLoader, parts: list[Cursor]) -> None:
        self._combined, self._parts = combined, parts
        self._epoch = 0
        self._next_pass = [0] * len(parts)
        self._passes: list[dict[int, dict[str, Any]]] = [{} for _ in parts]
        """For each loader what the newest passes of this epoch, and those that a checkpoint tells, are drawn from."""
        self._resumed: dict[str, Any] = {}

    @property
    def drawn_from(self) -> int | dict[str, Any]:
        """What the order was drawn from where there is only one loader; of several none can take it over."""
        return self._parts[0].drawn_from if len(self._parts) == 1 else {}

    @property
    def ends_without_drawing(self) -> bool:
        """Whether nothing happens at an epoch's end."""
        return all(part.ends_without_drawing for part in self._parts)

    def iterate(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """The items of an epoch.

        Args:
            epoch: which.
            skip: how many to leave out at the beginning.
        """
        resumed, self._resumed = self._resumed, {}
        places: list[tuple[int, int] | None] = [None] * len(self._parts)
        if skip:
            places = self._combined.places(skip)
        self._epoch = epoch
        self._next_pass = [place[0] if place else 0 for place in places]
        self._passes = [{} for _ in places]
        begun = sum(place is not None for place in places)
        for i, state in enumerate(resumed.get("parts", ())):
            known = {number: drawn for number, drawn in state["passes"] if number >= self._next_pass[i]}
            ended = self._combined.mode == "sequential" and i < begun - 1
            if ended or not known:
                self._parts[i].load_state_dict(state, within=False)
            else:
                self._passes[i] = known
        return self._combined.iterate_from(skip, [place[1] if place else 0 for place in places], self._begin)

    def _begin(self, index: int, skip: int) -> Iterator[Any]:
        part, passes, number = self._parts[index], self._passes[index], self._next_pass[index]
        self._next_pass[index] += 1
        if number in passes:  # it had begun when the checkpoint was saved
            part.load_state_dict(passes[number])
        batches = part.iterate(self._epoch, skip)
        passes[number] = part.state_dict(0)
        passes.pop(number - 2, None)  # one may be drawn from before training has come to its batches
        return batches

    def state_dict(self, position: int) -> dict[str, Any]:
        """What the position in this epoch means, for each loader.

        Args:
            position: how many items of the epoch are done with.
        """
        if self._resumed:  # and not iterated yet
            return self._resumed
        states = []
        for part, passes, number in zip(self._parts, self._passes, self._next_pass, strict=True):
            now, newest = part.state_dict(0), number - 1
            if newest in passes:  # samplers may have drawn more since it began
                passes[newest] = {**passes[newest], "generators_now": now["generators_now"]}
            states.append({**now, "passes": list(passes.items())})
        return {"parts": states}

    def load_state_dict(self, state: dict[str, Any], *, within: bool = True, whole: bool = True) -> None:
        """The next iteration continues the epoch that ``state`` is of; as in ``Cursor``."""
        self._check(state)
        self._resumed = state if within else {}
        if within:
            return
        for part, its in zip(self._parts, state["parts"]):
            part.load_state_dict(its, within=False, whole=whole)

    def _check(self, state: dict[str, Any]) -> None:
        if len(state.get("parts", ())) != len(self._parts):
            raise CheckpointMismatchError(
                f"The checkpoint was saved with {len(state.get('parts', ())) or 'one'} training loader(s), and here"
                f" {len(self._parts)} are combined. Resume with the loaders that it was saved with."
            )

    def take_generators(self, state: dict[str, Any], *, within: bool) -> None:
        """Give the user's generators what they had when the epoch of ``state`` began, or after it."""
        self._check(state)
        for part, its in zip(self._parts, state["parts"]):
            part.take_generators(its, within=within)

    def finish(self, epoch: int, skip: int, *, drain: bool, whole: bool) -> None:
        """Nothing is left of the epoch to continue but what samplers draw at its end, where it is iterated so far."""
        if self._resumed and drain:
            next(self.iterate(epoch, skip), None)
        self.leave()

    def leave(self) -> None:
        """An epoch that was resumed, and not iterated yet, is not continued."""
        if self._resumed:
            self.load_state_dict(self._resumed, within=False)

    def close(self) -> None:
        """End workers that persist."""
        for part in self._parts:
            part.close()
