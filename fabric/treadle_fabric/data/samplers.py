"""A loader's samplers, its length and its workers: find them, tell them the epoch, replace and record them."""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from treadle_fabric.checks import check_integer
from treadle_fabric.randomness import is_generator, worker_init_function

__all__ = [
    "DatasetOfSampler",
    "DistributedSamplerWrapper",
    "RecordedSampler",
    "has_iterable_dataset",
    "has_len",
    "innermost_sampler",
    "is_indexed",
    "record_order",
    "sampler_epoch",
    "samplers_of",
    "seed_workers",
    "set_epoch",
    "sized_len",
    "suggested_max_num_workers",
]


def is_indexed(loader: Any) -> bool:
    """Whether a loader is a ``DataLoader`` whose samples have indices, so that they can be shared out."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def samplers_of(loader: Any) -> Iterator[Any]:
    """The samplers of a loader, and the samplers that those draw from."""
    for sampler in (getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)):
        while sampler is not None:
            yield sampler
            sampler = getattr(sampler, "sampler", None)


def generators_of(loaders: Iterable[Any]) -> list[Any]:
    """The generators that the user gave to loaders and their samplers, or that samplers keep under any name."""
    found: dict[int, Any] = {}
    for loader in loaders:
        for owner in (loader, *samplers_of(loader)):
            for value in getattr(owner, "__dict__", {}).values():
                if is_generator(value):
                    found[id(value)] = value
    return list(found.values())


def innermost_sampler(loader: Any) -> Any:
    """The sampler that decides the order of a loader, and that all its other samplers draw from; None without one."""
    sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader, "sampler", None) if sampler is None else sampler
    while (inner := getattr(sampler, "sampler", None)) is not None:
        sampler = inner
    return sampler


def set_epoch(loader: Any, epoch: int) -> None:
    """Give the number of the next epoch to every sampler of a loader that has a ``set_epoch``."""
    seen: set[int] = set()
    for sampler in samplers_of(loader):
        setter = getattr(sampler, "set_epoch", None)
        if callable(setter) and id(sampler) not in seen:
            seen.add(id(sampler))
            setter(epoch)


def sampler_epoch(loader: Any) -> int | None:
    """The epoch that a loader's samplers were set to; ``None`` if no sampler counts epochs."""
    for sampler in samplers_of(loader):
        epoch = getattr(sampler, "epoch", None)
        if callable(getattr(sampler, "set_epoch", None)) and isinstance(epoch, int):
            return epoch
    return None


def index_sampler(loader: DataLoader[Any]) -> Any:
    """The sampler that a loader draws from: of batches, or of samples where it does not batch them."""
    return loader.batch_sampler if loader.batch_sampler is not None else loader.sampler


def copy_loader(loader: DataLoader[Any], **fields: Any) -> Any:
    """A copy of any kind of DataLoader with some attributes replaced, without running its constructor again.

    Workers that persist stay with the original.
    """
    other = copy.copy(loader)
    other.__dict__.update(fields, _iterator=None)  # DataLoader's __setattr__ refuses some of these names
    return other


def with_sampler(loader: DataLoader[Any], sampler: Any, **fields: Any) -> Any:
    """A copy of a loader that draws from another sampler; ``fields`` as in :func:`copy_loader`."""
    name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    return copy_loader(loader, **{name: sampler}, **fields)


class RecordedSampler:
    """Yields what another sampler yields, and keeps each item until the batch that is made of it has come.

    Args:
        sampler: Yields indices, or batches of them.
        batched: Whether its items are batches.
    """

    def __init__(self, sampler: Any, *, batched: bool) -> None:
        self.sampler, self._batched = sampler, batched
        self._drawn: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        self._drawn.clear()
        for item in self.sampler:  # workers have several batches drawn before the first one comes
            self._drawn.append(item)
            yield item

    def __len__(self) -> int:
        return len(self.sampler)

    def take(self) -> list[Any] | None:
        """The indices of the samples of the next batch that comes; ``None`` if nothing was drawn for it."""
        if not self._drawn:
            return None
        item = _as_python(self._drawn.popleft())
        several = self._batched or isinstance(item, list)  # a list where the dataset makes the batch of it
        return [_as_python(index) for index in item] if several else [item]


def _as_python(index: Any) -> Any:
    """An index as a plain number, where it is one of torch or NumPy."""
    return index.tolist() if hasattr(index, "tolist") else index


def record_order(loader: Any) -> tuple[Any, RecordedSampler | None]:
    """A loader whose samplers are recorded, and what records them.

    Args:
        loader: Any iterable of batches.

    Returns:
        A copy of the loader whose batches come in the order in which they are drawn, also from workers; its workers do
        not persist. The loader itself and ``None`` where samples have no indices, or where the loader iterates in a way
        of its own.
    """
    if not is_indexed(loader) or type(loader).__iter__ is not DataLoader.__iter__:
        return loader, None
    recorded = RecordedSampler(index_sampler(loader), batched=loader.batch_sampler is not None)
    return with_sampler(loader, recorded, persistent_workers=False, in_order=True), recorded


def end_workers(loader: DataLoader[Any]) -> None:
    """End workers that persist; garbage collection would wait five seconds for each."""
    if (iterator := loader.__dict__.get("_iterator")) is not None:
        iterator._shutdown_workers()
        loader.__dict__["_iterator"] = None


def seed_workers(loader: Any, rank: int) -> Any:
    """Give a loader's workers their seeds, if ``seed_everything(workers=True)`` was called and the user has not.

    Args:
        loader: Any loader.
        rank: The global rank of this process; workers of different ranks get different seeds.

    Returns:
        The loader, or a shallow copy with a ``worker_init_fn``.
    """
    wanted = os.environ.get("PL_SEED_WORKERS", "0") == "1"
    if not wanted or not isinstance(loader, DataLoader) or loader.worker_init_fn is not None or not loader.num_workers:
        return loader
    return copy_loader(loader, worker_init_fn=partial(worker_init_function, rank=rank))


def suggested_max_num_workers(local_world_size: int) -> int:
    """How many workers the loader of each process can have without waiting for a core; at least 1.

    The cores that this process may use are shared by the processes of the machine, each of which needs one itself.

    Args:
        local_world_size: The number of processes on this machine.

    Raises:
        MisconfigurationException: The number is less than 1.
    """
    processes = check_integer("local_world_size", local_world_size, minimum=1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes - 1)


def sized_len(loader: Any) -> int | None:
    """The number of batches of a loader; ``None`` if its length is unknown."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def has_len(loader: Any) -> bool:
    """Whether the number of batches of a loader is known."""
    return sized_len(loader) is not None


def has_iterable_dataset(dataloader: object) -> bool:
    """Whether the dataset of a loader is an ``IterableDataset``."""
    return isinstance(getattr(dataloader, "dataset", None), IterableDataset)


class DatasetOfSampler(Dataset[Any]):
    """What a sampler yields, as a dataset. It is drawn once for each :meth:`reset`.

    Args:
        sampler: A sampler, or a batch sampler, with a length.
    """

    def __init__(self, sampler: Iterable[Any]) -> None:
        if not hasattr(sampler, "__len__"):
            raise TypeError(
                f"{type(sampler).__name__} has no length, and ranks share out what has one: define __len__."
            )
        self._sampler: Any = sampler
        self._drawn: list[Any] | None = None

    def __getitem__(self, index: int) -> Any:
        if self._drawn is None:
            self._drawn = list(self._sampler)
        return self._drawn[index]

    def __len__(self) -> int:
        return len(self._sampler)

    def reset(self) -> None:
        """Draw anew."""
        self._drawn = list(self._sampler)


class DistributedSamplerWrapper(DistributedSampler[Any]):
    """Shares out over the ranks what any sampler yields.

    Args:
        sampler: A sampler, or a batch sampler, with a length.
        *args: As for ``torch.utils.data.DistributedSampler``.
        **kwargs: As for ``torch.utils.data.DistributedSampler``.
    """

    def __init__(self, sampler: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(DatasetOfSampler(sampler), *args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        drawn: Any = self.dataset
        drawn.reset()
        return (drawn[index] for index in super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler inside the epoch, too."""
        super().set_epoch(epoch)
        inside = getattr(self.dataset, "_sampler", None)
        if callable(setter := getattr(inside, "set_epoch", None)):
            setter(epoch)
