"""Go to a position by dropping indices: a DataLoader over indexed samples that are loaded by workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch.utils.data import DataLoader

from treadle_fabric.data.cursors.one_loader import OneLoaderCursor
from treadle_fabric.data.cursors.orders import with_private_order
from treadle_fabric.data.cursors.seeded import SeededByBatch, SeededSampler
from treadle_fabric.data.samplers import end_workers, index_sampler, with_sampler

__all__ = ["WorkersCursor"]


@final
class WorkersCursor(OneLoaderCursor):
    """Leaves out the indices before the position, and seeds workers by batch.

    What a worker draws for a batch depends on the number of the batch only, neither on the number of workers nor on the
    batches that were loaded before.

    Args:
        loader: The loader.
        rank: This process.
    """

    skips_by_index = True

    def __init__(self, loader: DataLoader[Any], rank: int) -> None:
        loader, private = with_private_order(loader)
        self._sampler = SeededSampler(index_sampler(loader), batched=loader.batch_sampler is not None)
        loader = with_sampler(loader, self._sampler, dataset=SeededByBatch(loader.dataset))
        super().__init__(loader, rank, private=private)
        self._seeded = False
        """Whether workers that persist took their seed in an epoch before the checkpoint was saved."""

    def _batches(self, skip: int, resumed: dict[str, Any], now: dict[str, Any]) -> Iterator[Any]:
        with self._order_drawn_again(resumed, now):
            self._sampler.begin(self._key, skip)
            return self._start(bool(resumed))

    def _start(self, resumed: bool) -> Iterator[Any]:
        """Workers that persist drew their seed in the first epoch; a resumed one must not draw it again."""
        fields = self._loader.__dict__
        seeded, self._seeded = self._seeded and self._loader.persistent_workers, False
        if not (resumed and self._warm) and not seeded:
            self._warm = fields.get("_iterator") is not None
            return iter(self._loader)
        self._warm = True
        generator, fields["generator"] = fields["generator"], torch.Generator()
        try:
            return iter(self._loader)
        finally:
            fields["generator"] = generator

    def _end_loader(self, state: dict[str, Any], *, ended: bool, whole: bool) -> None:
        self._seeded = bool(self._rng)

    def close(self) -> None:
        end_workers(self._loader)
