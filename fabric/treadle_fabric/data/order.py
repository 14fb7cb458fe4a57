"""The order of samples of a training loader, in numbers that do not depend on the number of processes that share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch.utils.data import BatchSampler

from treadle_fabric.data.resume import Layout, Saved
from treadle_fabric.data.samplers import innermost_sampler, is_indexed, sized_len
from treadle_fabric.data.sharding import sharded_sampler

__all__ = ["SampleOrder"]

_Numbers: TypeAlias = tuple[int | None, ...]


class SampleOrder:
    """The order that the samplers of a training loader draw, and the part of it that is left of an epoch.

    Args:
        parts: This rank's loaders; those with indexed samples have an order.
        world_size: Number of processes that share the order.
        num_batches: Batches of a usual epoch; infinity where that is unknown.
    """

    def __init__(self, parts: Sequence[Any], world_size: int, num_batches: float) -> None:
        self._parts, self._world_size, self._num_batches = parts, world_size, num_batches
        self._samplers = [sampler for part in parts if (sampler := sharded_sampler(part)) is not None]
        self.base = 0
        """Batches of this epoch that this loader's iteration does not count: they were trained in another layout."""
        self.end: int | None = None
        """This epoch's end (exclusive), where it differs from other epochs' after a resume."""
        self._start = (0,) * len(self._samplers)
        self._source: Any = None
        self._continues = False

    def begin(self) -> None:
        """Begin an epoch: the rest of one where :meth:`go_on` was called before, otherwise a whole one."""
        if not self._continues:
            self.go_on(0, (0,) * len(self._samplers), None, None)
        self._continues = False

    def leave(self) -> None:
        """Begin a whole epoch next."""
        self._continues = False

    def go_on(self, base: int, start: Sequence[int], end: int | None, source: Any) -> None:
        """The next epoch continues one of a checkpoint.

        Args:
            base: The new :attr:`base`.
            start: Items to leave out at the beginning of each loader's order.
            end: The new :attr:`end`.
            source: What the order is drawn from, where that is not :attr:`seed`.
        """
        self._continues = True
        if self._samplers:
            self.base, self.end, self._start, self._source = base, end, tuple(start), source
            self._set_start(self._start)

    def _set_start(self, start: Sequence[int]) -> None:
        for sampler, first in zip(self._samplers, start):
            sampler.go_on(first, self._source)

    @property
    def seed(self) -> int | None:
        """What orders are drawn from, with the epoch; None where the user's samplers draw them as they do alone."""
        return self._samplers[0].seed if self._samplers else None

    @seed.setter
    def seed(self, seed: int) -> None:
        for sampler in self._samplers:
            sampler.seed = seed

    def layout(self, saved: Saved) -> Layout:
        """The layout of this run, with what is left of an epoch after the saved position."""
        self._set_start([saved.items] * len(self._samplers))
        left = sized_len(self._parts[0])
        self._set_start(self._start)
        shared = len(self._samplers) == len(self._parts)
        return Layout(self._world_size, *self._data(), shared, self._num_batches, left)

    def _data(self) -> tuple[_Numbers, _Numbers, tuple[str | None, ...], _Numbers]:
        """For each loader: items in a batch of all ranks, samples, class of the sampler, size of an unordered batch."""
        per_step, samples, samplers, sizes = zip(*(_describe(part, self._world_size) for part in self._parts))
        return per_step, samples, samplers, sizes

    def state_dict(self, drawn_from: Any) -> dict[str, Any]:
        """What another number of processes needs to go on in the same order.

        Args:
            drawn_from: The seed or random states of this epoch's order, where no seed of all ranks is behind it.
        """
        per_step, samples, samplers, sizes = map(list, self._data())
        return {
            "world_size": self._world_size,
            "seed": self.seed,
            "source": self._source if self._samplers else drawn_from,
            "base": self.base,
            "end": self.end,
            "start": list(self._start) or [0] * len(self._parts),
            "per_step": per_step,
            "samples": samples,
            "samplers": samplers,
            "sizes": sizes,
            "num_batches": self._num_batches,
        }


def _describe(loader: Any, world_size: int) -> tuple[int | None, int | None, str | None, int | None]:
    if not is_indexed(loader):
        return None, None, None, _size(loader)
    batched = type(loader.batch_sampler) is BatchSampler  # otherwise an item is a sample, or a batch of the user's own
    per_step = int(loader.batch_sampler.batch_size) * world_size if batched else world_size
    size = None if batched else _size(loader.batch_sampler)
    return per_step, sized_len(loader.dataset), type(innermost_sampler(loader)).__name__, size


def _size(batches: Any) -> int | None:
    size = getattr(batches, "batch_size", None)
    return size if isinstance(size, int) else None
