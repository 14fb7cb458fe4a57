"""Go to a position by index: a list or tuple of batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, final

from treadle_fabric.data.cursors.one_loader import OneLoaderCursor

__all__ = ["ListCursor"]


@final
class ListCursor(OneLoaderCursor):
    """Leaves out the batches before the position; the arguments are those of :class:`OneLoaderCursor`."""

    skips_by_index = True

    def _batches(self, skip: int, resumed: dict[str, Any], now: dict[str, Any]) -> Iterator[Any]:
        return islice(self._loader, skip, None)
