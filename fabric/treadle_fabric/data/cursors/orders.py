"""The order of a sampler: without its first items, or drawn from random numbers apart from the global generators."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

from torch.utils.data import DataLoader

from treadle_fabric.data.samplers import index_sampler, samplers_of, with_sampler
from treadle_fabric.data.sharding import ShardedSampler
from treadle_fabric.randomness import PrivateRandomness

__all__ = ["PrivateOrder", "RestOfOrder", "with_private_order"]

_CHUNK = 16  # items drawn with one change of the random state


class RestOfOrder:
    """The items of a sampler after the first ``skip`` ones.

    Args:
        sampler: The sampler.
        skip: The number of items to leave out.
        before: Called before the order is drawn, with the first item. Default: :meth:`begin` draws it earlier.
    """

    def __init__(self, sampler: Iterable[Any], skip: int, before: Callable[[], None] | None = None) -> None:
        self._sampler, self._skip, self._before = sampler, skip, before
        self._iterator: Iterator[Any] = iter(())

    def begin(self) -> None:
        """Draw the order now; samplers draw it when they are asked for the first item."""
        iterator = iter(self._sampler)
        deque(islice(iterator, self._skip), maxlen=0)
        self._iterator = iterator if self._skip else chain(list(islice(iterator, 1)), iterator)

    def __iter__(self) -> Iterator[Any]:
        if self._before is not None:
            self._before()
            self.begin()
        yield from self._iterator  # looked up with the first item, after `begin`

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]


class PrivateOrder:
    """What a sampler of the user's own class yields: such a sampler may draw at any time, so it draws apart.

    Args:
        sampler: The user's sampler.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler, self._key = sampler, 0

    def begin(self, key: int) -> None:
        """Seed the order of the epoch that begins."""
        self._key = key

    def __iter__(self) -> Iterator[Any]:
        for chunk in PrivateRandomness(self._key).chunks(self.sampler, _CHUNK):
            yield from chunk

    def __len__(self) -> int:
        return len(self.sampler)


def with_private_order(loader: DataLoader[Any]) -> tuple[DataLoader[Any], PrivateOrder | None]:
    """The loader with a private order and that order; the loader itself and None where nothing draws at any time.

    PyTorch's samplers draw their order when an iteration begins, or from a generator of their own.
    """
    if all(
        isinstance(s, ShardedSampler) or type(s).__module__.startswith("torch.utils.data") for s in samplers_of(loader)
    ):
        return loader, None
    private = PrivateOrder(index_sampler(loader))
    return with_sampler(loader, private), private
