"""Choose the cursor of a loader by what the loader is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader

from treadle_fabric.data.cursors.combined import CombinedCursor
from treadle_fabric.data.cursors.cursor import Cursor
from treadle_fabric.data.cursors.indexed import IndexedCursor
from treadle_fabric.data.cursors.listed import ListCursor
from treadle_fabric.data.cursors.replayed import ReplayedCursor
from treadle_fabric.data.cursors.stateful import StatefulCursor
from treadle_fabric.data.cursors.workers import WorkersCursor
from treadle_fabric.data.samplers import is_indexed, sized_len
from treadle_fabric.data.streams import keeps_position

__all__ = ["make_cursor"]


def make_cursor(loader: Any, parts: Sequence[Any], rank: int, *, looks_ahead: bool) -> Cursor:
    """The cursor of a training loader.

    Args:
        loader: Any iterable of batches.
        parts: The loaders of a ``CombinedLoader``, where each is to have a position of its own; else the loader.
        rank: This process; workers of different ranks draw different numbers.
        looks_ahead: Whether the user of the cursor draws batches before training comes to them.
    """
    if parts[0] is not loader and not looks_ahead and None not in map(sized_len, parts):
        cursors = [_of_one(part, rank, among_others=True) for part in parts]
        if all(cursor.skips_by_index for cursor in cursors):
            return CombinedCursor(loader, cursors)
    return _of_one(loader, rank)


def _of_one(loader: Any, rank: int, *, among_others: bool = False) -> Cursor:
    if keeps_position(loader):
        return StatefulCursor(loader, rank)
    if is_indexed(loader) and type(loader).__iter__ is DataLoader.__iter__:
        if loader.num_workers:
            return WorkersCursor(loader, rank)
        return IndexedCursor(loader, rank, among_others=among_others)
    kind = ListCursor if isinstance(loader, (list, tuple)) else ReplayedCursor
    return kind(loader, rank)
