"""Choose the cursor of a loader by what the loader is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader

from treadle_fabric.data.combined import CombinedLoader
from treadle_fabric.data.cursors.combined import CombinedCursor
from treadle_fabric.data.cursors.cursor import Cursor
from treadle_fabric.data.cursors.indexed import IndexedCursor
from treadle_fabric.data.cursors.listed import ListCursor
from treadle_fabric.data.cursors.replayed import ReplayedCursor
from treadle_fabric.data.cursors.stateful import StatefulCursor
from treadle_fabric.data.cursors.workers import WorkersCursor
from treadle_fabric.data.samplers import is_indexed, sized_len

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
        cursors = [_of_one(part, rank, looks_ahead=False, among_others=True) for part in parts]
        if all(cursor.skips_by_index for cursor in cursors):
            return CombinedCursor(loader, cursors)
    return _of_one(loader, rank, looks_ahead=looks_ahead)


def _of_one(loader: Any, rank: int, *, looks_ahead: bool, among_others: bool = False) -> Cursor:
    combined = isinstance(loader, CombinedLoader)  # whose state is that of its loaders, and not its position
    if not combined and hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return StatefulCursor(loader, rank, looks_ahead=looks_ahead)
    if is_indexed(loader) and type(loader).__iter__ is DataLoader.__iter__:
        if loader.num_workers:
            return WorkersCursor(loader, rank, looks_ahead=looks_ahead)
        return IndexedCursor(loader, rank, looks_ahead=looks_ahead, among_others=among_others)
    kind = ListCursor if isinstance(loader, (list, tuple)) else ReplayedCursor
    return kind(loader, rank, looks_ahead=looks_ahead)
