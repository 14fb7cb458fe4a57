"""Samplers and datasets that seed the workers of a loader."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import get_worker_info

__all__ = ["SeededByBatch", "SeededSampler", "SeededStream"]

_STRIDE = 1_000_003  # between the seeds of two epochs


class SeededBatch(list[Any]):
    """The indices of a batch, and the seed for loading it."""

    seed = 0

    def __reduce__(self) -> Any:
        return _seeded, (list(self), self.seed)


def _seeded(indices: list[Any], seed: int) -> SeededBatch:
    batch = SeededBatch(indices)
    batch.seed = seed
    return batch


class SeededSampler:
    """A sampler whose items carry seeds, each made of the key of the epoch and the number of the item.

    Args:
        sampler: Yields indices, or batches of them.
        batched: Whether its items are batches.
    """

    def __init__(self, sampler: Any, *, batched: bool) -> None:
        self.sampler, self._batched = sampler, batched
        self._key = self._skip = 0

    def begin(self, key: int, skip: int) -> None:
        """An epoch begins, without its first ``skip`` items."""
        self._key, self._skip = key, skip

    def __iter__(self) -> Iterator[SeededBatch]:
        key, skip = self._key, self._skip
        for number, item in islice(enumerate(self.sampler), skip, None):
            yield _seeded(item if self._batched else [item], key * _STRIDE + number)

    def __len__(self) -> int:
        return len(self.sampler)


class _Around:
    """Takes the place of a dataset in a loader, and has the attributes of the dataset."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name in ("_dataset", "_epoch"):  # not there yet: being unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the dataset: a ``worker_init_fn`` opens files, say, and keeps them there."""
        if name in ("_dataset", "_epoch"):
            super().__setattr__(name, value)
        else:
            setattr(self._dataset, name, value)


class SeededStream(_Around):
    """A stream whose workers persist: seeded anew for each epoch, whose key they can read only in shared memory."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()  # type: ignore[no-untyped-call]

    def begin(self, key: int) -> None:
        """An epoch begins."""
        self._epoch.fill_(key)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        _seed(int(self._epoch) * _STRIDE + (info.id if info is not None else 0))
        return iter(self._dataset)


class SeededByBatch(_Around):
    """A dataset that seeds the worker it is in before it loads a batch."""

    def __getitems__(self, batch: SeededBatch) -> list[Any]:
        _seed(batch.seed)
        several = getattr(self._dataset, "__getitems__", None)
        return several(batch) if callable(several) else [self._dataset[i] for i in batch]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, SeededBatch):  # without automatic batching
            _seed(index.seed)
            return self._dataset[index[0]]
        return self._dataset[index]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
