"""Loaders whose batches have this rank's slice of each sequence."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch.utils.data import DataLoader

from treadle_fabric.strategies.parallelism.sequence import SequenceGroup, split_sequence

__all__ = ["split_batches"]


def split_batches(loader: Any, ranks: SequenceGroup, dim: int = 1, names: Collection[str | int] | None = None) -> Any:
    """Return a loader that slices its batches, in its workers if it has some.

    Args:
        loader: Of torch's ``DataLoader``, or any iterable of batches.
        ranks: Those that share sequences.
        dim: As in :func:`split_sequence`, like the next one.
        names: What is sliced.

    Returns:
        A loader that shares sampler, dataset and state with ``loader``; the same object if there is one rank.
    """
    if ranks.size == 1 or isinstance(loader, _SlicedBatches):
        return loader
    place = SequenceGroup(None, ranks.rank, ranks.size)  # without the process group, which workers do not have
    if not isinstance(loader, DataLoader):
        cls = _SizedSlicedBatches if hasattr(loader, "__len__") else _SlicedBatches
        return cls(loader, place, dim, names)
    if isinstance(loader.collate_fn, _Slicing):
        return loader
    sliced = copy.copy(loader)
    sliced.collate_fn = _Slicing(loader.collate_fn, place, dim, names)
    return sliced


class _Slicing:
    """A ``collate_fn`` whose batches are sliced."""

    def __init__(
        self, collate: Callable[[Any], Any], ranks: SequenceGroup, dim: int, names: Collection[str | int] | None
    ) -> None:
        self._collate, self._ranks, self._dim, self._names = collate, ranks, dim, names

    def __call__(self, samples: Any) -> Any:
        return split_sequence(self._collate(samples), self._ranks, self._dim, self._names)


class _SlicedBatches:
    """An iterable of batches that are sliced; everything else is the iterable's."""

    def __init__(self, loader: Any, ranks: SequenceGroup, dim: int, names: Collection[str | int] | None) -> None:
        self._loader, self._ranks, self._dim, self._names = loader, ranks, dim, names

    def __iter__(self) -> Iterator[Any]:
        return (split_sequence(batch, self._ranks, self._dim, self._names) for batch in self._loader)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # not there yet: being copied or unpickled
            raise AttributeError(name)
        return getattr(self._loader, name)


class _SizedSlicedBatches(_SlicedBatches):
    def __len__(self) -> int:
        return len(self._loader)
