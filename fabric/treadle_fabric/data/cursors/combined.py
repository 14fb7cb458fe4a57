"""Go to a position in each of several combined loaders, where all of them skip by index arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, final

from treadle_fabric.data.combined import CombinedLoader
from treadle_fabric.data.cursors.cursor import Cursor
from treadle_fabric.errors import CheckpointMismatchError

__all__ = ["CombinedCursor"]


@final
class CombinedCursor(Cursor):
    """Gives each loader of a CombinedLoader a position of its own.

    Args:
        combined: Says when a batch is drawn from which of its loaders.
        parts: One cursor for each of its loaders.
    """

    def __init__(self, combined: CombinedLoader, parts: Sequence[Cursor]) -> None:
        super().__init__()
        self._combined, self._parts = combined, parts
        self._epoch = 0
        self._next_pass = [0] * len(parts)
        self._passes: list[dict[int, dict[str, Any]]] = [{} for _ in parts]
        """For each loader: what its newest passes in this epoch, and those in the checkpoint, are drawn from."""
        self.ends_without_drawing = all(part.ends_without_drawing for part in parts)

    @property
    def drawn_from(self) -> int | dict[str, Any]:
        """What the order was drawn from where there is only one loader; of several none can be continued by others."""
        return self._parts[0].drawn_from if len(self._parts) == 1 else {}

    def _iterate(self, epoch: int, skip: int, resumed: dict[str, Any]) -> Iterator[Any]:
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
        if number - 1 in passes:  # whose order was drawn with its first batch
            passes[number - 1] = part.state_dict(0)
        if number in passes:  # it had begun when the checkpoint was saved
            part.load_state_dict(passes[number])
        batches = part.iterate(self._epoch, skip)
        passes[number] = part.state_dict(0)
        passes.pop(number - 2, None)  # the newest may be drawn from before training has come to its batches
        return batches

    def _state(self, position: int) -> dict[str, Any]:
        states = []
        for part, passes, number in zip(self._parts, self._passes, self._next_pass, strict=True):
            now, newest = part.state_dict(0), number - 1
            if newest in passes:  # it has drawn its order since it began, and samplers may have drawn more
                passes[newest] = now
            states.append({**now, "passes": list(passes.items())})
        return {"parts": states}

    def _check(self, state: dict[str, Any]) -> None:
        if len(state.get("parts", ())) != len(self._parts):
            raise CheckpointMismatchError(
                f"The checkpoint was saved with {len(state.get('parts', ())) or 'one'} training loader(s), and here"
                f" {len(self._parts)} are combined. Resume with the loaders that it was saved with."
            )

    def _follow(self, state: dict[str, Any], *, ended: bool, whole: bool) -> None:
        for part, its in zip(self._parts, state["parts"]):
            part.load_state_dict(its, within=False, whole=whole)

    def take_generators(self, state: dict[str, Any], *, within: bool) -> None:
        self._check(state)
        for part, its in zip(self._parts, state["parts"]):
            part.take_generators(its, within=within)

    def close(self) -> None:
        for part in self._parts:
            part.close()
