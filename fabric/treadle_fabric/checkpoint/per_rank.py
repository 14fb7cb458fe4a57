"""Values that each rank has of its own: how a state marks them, and how they are read one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

__all__ = ["PerRank", "RankParts", "on_demand", "parts_on_demand"]

_on_demand: ContextVar[bool] = ContextVar("treadle_parts_on_demand", default=False)


@dataclass(frozen=True, eq=False)
class PerRank:
    """Marks a value of which each rank has its own, in a state that is saved; on every rank at the same place.

    In a file the list of the values of all ranks takes its place, and rank 0 alone gathers them. In a folder each rank
    writes its own value, which no other rank sees. Both are loaded as that list.

    Args:
        value: This rank's. Best made of tensors and plain containers only.
    """

    value: Any


@contextmanager
def parts_on_demand() -> Iterator[None]:
    """What is loaded inside from a folder has a sequence in the place of the list of all ranks' values.

    The sequence has the length of that list, and reads a rank's value when it is asked for it, so that a rank that
    needs no more than its own reads no other. It raises a CheckpointError where another checkpoint has taken the place
    of the folder since, or where the value is damaged. A file is read whole all the same.
    """
    token = _on_demand.set(True)
    try:
        yield
    finally:
        _on_demand.reset(token)


def on_demand() -> bool:
    """Whether this is inside of :func:`parts_on_demand`."""
    return _on_demand.get()


class RankParts(Sequence[Any]):
    """The values of all ranks, each read when it is asked for."""

    def __init__(self, size: int, read: Callable[[int], Any]) -> None:
        self._size, self._read = size, read

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, rank: Any) -> Any:
        return self._read(range(self._size)[rank])
