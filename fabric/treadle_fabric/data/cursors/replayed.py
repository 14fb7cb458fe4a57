"""Go to a position by drawing everything before it again: streams, iterables of the user's own, combined loaders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

from torch.utils.data import DataLoader, IterableDataset

from treadle_fabric.data.cursors.one_loader import OneLoaderCursor
from treadle_fabric.data.cursors.seeded import SeededStream
from treadle_fabric.data.samplers import end_workers, index_sampler, with_sampler
from treadle_fabric.randomness import PrivateRandomness

__all__ = ["ReplayedCursor"]

_CHUNK = 16  # batches drawn with one change of the random state


@final
class ReplayedCursor(OneLoaderCursor):
    """Iterates the loader from its beginning, with random numbers of its own, so that training may draw any others.

    Args:
        loader: The loader.
        rank: This process.
        looks_ahead: As in :class:`OneLoaderCursor`.
    """

    def __init__(self, loader: Any, rank: int, *, looks_ahead: bool) -> None:
        super().__init__(loader, rank, looks_ahead=looks_ahead)
        self._stream: SeededStream | None = None
        if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset) and loader.persistent_workers:
            self._stream = SeededStream(loader.dataset)
            self._loader = with_sampler(loader, index_sampler(loader), dataset=self._stream)

    def _batches(self, skip: int, resumed: dict[str, Any], now: dict[str, Any]) -> Iterator[Any]:
        if self._stream is not None:
            self._stream.begin(self._key)
        return self._replay(skip)

    def _replay(self, skip: int) -> Iterator[Any]:
        private = PrivateRandomness(self._key)
        iterator, _ = private.take(lambda: iter(self._loader), 0)
        while skip > 0:
            private.take(iterator, min(skip, _CHUNK))
            skip -= _CHUNK
        while batch := private.take(iterator, 1)[1]:
            yield batch[0]

    def close(self) -> None:
        if self._stream is not None:
            end_workers(self._loader)
