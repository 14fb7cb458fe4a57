"""Share the samples of a loader out over the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any, TypeVar

from torch.utils.data import BatchSampler, DistributedSampler, Sampler

from treadle_fabric.coordination import all_gather_objects
from treadle_fabric.data.samplers import copy_loader, index_sampler, is_indexed, samplers_of, with_sampler
from treadle_fabric.randomness.private import PrivateRandomness
from treadle_fabric.strategies import Strategy

__all__ = ["ShardedSampler", "is_shared", "one_of_each", "shard_dataloader", "shares_of_ranks"]

T = TypeVar("T")


class ShardedSampler(Sampler[Any]):
    """One rank's share of what another sampler yields, indices or whole batches.

    Every rank draws the whole order and takes each ``num_replicas``-th item. The batches of all ranks at a step then
    hold the samples of one batch of a single process with ``num_replicas`` times the batch size. What the sampler draws
    from the global random state, it draws from a private one, seeded by ``seed + epoch`` alike on all ranks.

    Args:
        sampler: The user's sampler.
        num_replicas: Number of ranks that share the samples.
        rank: The number of this rank among them.
        seed: Seeds the order, with the epoch; the same on every rank.
        pad: ``True``: every rank gets the same number of items; items from the beginning are repeated at the end.
            ``False``: every item goes to exactly one rank.
        drop_last: With ``pad``, leave out the items at the end instead of repeating some.
    """

    _CHUNK = 1024  # items drawn with one change of the random state

    def __init__(
        self,
        sampler: Iterable[Any],
        *,
        num_replicas: int,
        rank: int,
        seed: int = 0,
        pad: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.sampler = sampler
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.pad = pad
        self.drop_last = drop_last
        self.epoch = 0
        self.start = 0
        """Items to leave out at the beginning of the order, counted over all ranks."""
        self.source: int | Mapping[str, Any] | None = None
        """What the order is drawn from instead of ``seed + epoch``: a seed, or random states."""

    def set_epoch(self, epoch: int) -> None:
        """Seed the next order."""
        self.epoch = epoch

    def go_on(self, start: int, source: int | Mapping[str, Any] | None) -> None:
        """Continue an order that has begun, perhaps on another number of ranks; 0 and None begin whole orders again.

        Args:
            start: The items of the order that are done.
            source: The seed or random states that the order was drawn from.
        """
        self.start, self.source = start, source

    def __iter__(self) -> Iterator[Any]:
        head: list[Any] = []
        rest: list[Any] = []  # what is not shared out yet
        skip, ranks = self.start, self.num_replicas
        randomness = PrivateRandomness(self.seed + self.epoch if self.source is None else self.source)
        for chunk in randomness.chunks(self.sampler, self._CHUNK):
            head += chunk[: ranks - len(head)]
            rest += chunk[skip:]
            skip = max(skip - len(chunk), 0)
            whole = len(rest) - len(rest) % ranks
            yield from rest[self.rank : whole : ranks]
            del rest[:whole]
        if rest and self.pad and not self.drop_last:
            rest += islice(cycle(head), ranks - len(rest))
            yield rest[self.rank]
        elif rest and not self.pad and self.rank < len(rest):
            yield rest[self.rank]

    def __len__(self) -> int:
        items = max(len(self.sampler) - self.start, 0)  # type: ignore[arg-type]
        whole, rest = divmod(items, self.num_replicas)
        if self.pad:
            return whole + (rest > 0 and not self.drop_last)
        return whole + (self.rank < rest)


def shard_dataloader(
    loader: Any,
    *,
    num_replicas: int,
    rank: int,
    seed: int = 0,
    pad: bool = True,
    whole_batches: bool = False,
    alone: bool = False,
) -> Any:
    """Share a loader's samples out among the ranks, in the order of the user's own sampler.

    Args:
        loader: Returned as it is if it is no ``DataLoader``, reads an ``IterableDataset`` (which shards itself), or has
            a ``DistributedSampler`` already.
        num_replicas: Number of ranks. With one, the loader is returned as it is.
        rank: The number of this rank.
        seed: Seeds samplers that draw from the global random state; the same on every rank.
        pad: ``True`` for training: all ranks get the same number of batches. ``False`` for evaluation: every sample
            counts once, and one rank may have a batch more than another.
        whole_batches: Ranks take turns with the batches of one process, instead of sharing each step's samples.
        alone: Draw the order from ``seed``, as several ranks do, also where there is only one.

    Returns:
        A shallow copy of the loader with other samplers; any subclass keeps its class and attributes.
    """
    if (num_replicas == 1 and not alone) or not is_indexed(loader):
        return loader
    if any(isinstance(s, (DistributedSampler, ShardedSampler)) for s in samplers_of(loader)):
        return loader
    share = partial(ShardedSampler, num_replicas=num_replicas, rank=rank, seed=seed, pad=pad)
    batch_sampler = loader.batch_sampler
    if type(batch_sampler) is BatchSampler and not whole_batches:
        sampler = share(batch_sampler.sampler, drop_last=batch_sampler.drop_last and pad)
        batches = BatchSampler(sampler, batch_sampler.batch_size, batch_sampler.drop_last)
        return copy_loader(loader, sampler=sampler, batch_sampler=batches)
    return with_sampler(loader, share(index_sampler(loader)))  # of whole batches, or the user collates the samples


def sharded_sampler(loader: Any) -> ShardedSampler | None:
    """The sampler with which the ranks share a loader's samples out; None without one."""
    return next((sampler for sampler in samplers_of(loader) if isinstance(sampler, ShardedSampler)), None)


def shares_of_ranks(strategy: Strategy) -> list[int]:
    """Which share of the samples each rank has, from 0; ranks that work together have the same one.

    Every rank calls this.
    """
    if strategy.data_parallel_size == strategy.world_size:
        return list(range(strategy.world_size))
    return all_gather_objects(strategy, strategy.data_parallel_rank)


def one_of_each(parts: Sequence[T], shares: Sequence[int] | None = None) -> list[T]:
    """The state of one rank for each share of the samples, in the order of the shares.

    Args:
        parts: The states of all ranks, which are copies where the share is the same. But metrics of a pipeline are
            where the last stage is: of each share the last rank's state is taken.
        shares: The share of each rank. Default: each rank has one of its own.
    """
    if shares is None:
        return list(parts)
    last = {share: rank for rank, share in enumerate(shares)}
    return [parts[last[share]] for share in sorted(last)]


def is_shared(loader: Any) -> bool:
    """Whether a loader gives this rank its share of the samples, which :func:`shard_dataloader` arranges."""
    return sharded_sampler(loader) is not None
