"""Batches and loaders: what gets which samples, and on which device."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from treadle_fabric.seed import NumPyState, set_rng_states, worker_init_function

__all__ = [
    "PrivateRandomness",
    "ShardedSampler",
    "batch_mover",
    "has_len",
    "infer_batch_size",
    "innermost_sampler",
    "is_indexed",
    "map_tensors",
    "move_data_to_device",
    "sampler_epoch",
    "samplers",
    "seed_workers",
    "set_epoch",
    "shard_dataloader",
    "sized_len",
]


def move_data_to_device(batch: Any, device: torch.device | str | int) -> Any:
    """Move a batch to a device.

    Args:
        batch: A tensor, an object with ``.to(device)``, or lists, tuples, mappings and dataclasses that hold some;
            everything else is left as it is.
        device: Where to.

    Returns:
        The moved batch; the same object when everything is there already.
    """
    if not isinstance(device, torch.device):
        device = torch.device(device)
    kind = type(batch)
    if kind is Tensor:
        return batch if batch.device == device else _move(batch, device)
    # Batches that are already there cost no more than this look
    if kind is list or kind is tuple:
        for item in batch:
            if type(item) is not Tensor or item.device != device:
                break
        else:
            return batch
    elif kind is dict:
        for item in batch.values():
            if type(item) is not Tensor or item.device != device:
                break
        else:
            return batch
    return map_tensors(batch, partial(_move, device=device), movable=True)


def batch_mover(device: torch.device) -> Callable[[Any], Any]:
    """:func:`move_data_to_device` for one device, quicker for batches that are on the CPU and stay there."""

    def move(batch: Any) -> Any:
        return move_data_to_device(batch, device)

    def stay(batch: Any) -> Any:
        kind = type(batch)
        if kind is list or kind is tuple:
            for item in batch:
                if type(item) is not Tensor or not item.is_cpu:
                    return move_data_to_device(batch, device)
            return batch
        return move_data_to_device(batch, device)

    return stay if device.type == "cpu" else move


def _move(data: Any, device: torch.device) -> Any:
    if isinstance(data, Tensor):
        if data.device == device:
            return data
        # From pinned memory the copy runs beside the computation; out of CUDA the host would read too early
        return data.to(device, non_blocking=device.type == "cuda")
    moved = data.to(device)
    return data if moved is None else moved


def map_tensors(
    data: Any,
    function: Callable[[Any], Any],
    *,
    leaf: type | tuple[type, ...] = Tensor,
    movable: bool = False,
) -> Any:
    """Apply a function to every tensor in nested containers.

    Args:
        data: A tensor, or lists, tuples, mappings and dataclasses that hold some.
        function: Gets a tensor, gives what takes its place.
        leaf: The types it applies to.
        movable: Also apply it to other objects that have a ``to`` method.

    Returns:
        The same structure; a container in which nothing changed is the same object.
    """
    if isinstance(data, leaf) or (movable and callable(getattr(data, "to", None))):
        return function(data)
    if isinstance(data, (list, tuple)):
        items = [map_tensors(x, function, leaf=leaf, movable=movable) for x in data]
        if all(new is old for new, old in zip(items, data, strict=True)):
            return data
        return _rebuild_sequence(data, items)
    if isinstance(data, Mapping):
        changed = {}
        for key, value in data.items():
            new = map_tensors(value, function, leaf=leaf, movable=movable)
            if new is not value:
                changed[key] = new
        return _rebuild_mapping(data, changed) if changed else data
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        changed = {}
        for field in dataclasses.fields(data):
            value = getattr(data, field.name, None)
            new = map_tensors(value, function, leaf=leaf, movable=movable)
            if new is not value:
                changed[field.name] = new
        if not changed:
            return data
        result = copy.copy(data)
        for name, value in changed.items():
            object.__setattr__(result, name, value)  # frozen ones too
        return result
    return data


def _rebuild_sequence(data: Any, items: list[Any]) -> Any:
    kind = type(data)
    if kind is list:
        return items
    if isinstance(data, list):
        result = copy.copy(data)
        result[:] = items
        return result
    return kind(*items) if hasattr(data, "_fields") else kind(items)


def _rebuild_mapping(data: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    if type(data) is dict:
        return {**data, **changed}
    if isinstance(data, MutableMapping):
        result = copy.copy(data)
        for key, value in changed.items():
            result[key] = value
        return result
    return type(data)({**data, **changed})  # type: ignore[call-arg]


def infer_batch_size(batch: Any) -> int | None:
    """The first dimension of the first tensor or array found in a batch; None where there is none."""
    stack = [batch]
    while stack:
        item = stack.pop()
        shape = getattr(item, "shape", None)
        if isinstance(shape, tuple):  # a tensor's is one
            return int(shape[0]) if shape else 1
        if isinstance(item, str):
            continue
        if isinstance(item, Mapping):
            stack += reversed(list(item.values()))
        elif isinstance(item, (list, tuple)):
            stack += reversed(item)
        elif hasattr(item, "__dict__"):
            stack += reversed([v for k, v in vars(item).items() if not k.startswith("_")])
    return None


class PrivateRandomness:
    """Random state of its own: what is drawn inside does not depend on the world outside, nor change it.

    Args:
        begin: A seed, or what ``collect_rng_states`` returned.
    """

    def __init__(self, begin: int | Mapping[str, Any]) -> None:
        self._begin = begin
        self._inside: _RandomState | None = None
        self._outside: _RandomState | None = None

    def take(self, items: Iterator[Any] | Callable[[], Iterator[Any]], n: int) -> tuple[Iterator[Any], list[Any]]:
        """The next ``n`` items; a function is called for the iterator, which may draw already."""
        self._outside = outside = _RandomState(self._outside)
        if self._inside is not None:
            self._inside.replace(outside)
        else:
            self._seed()
        try:
            iterator = items() if callable(items) else items
            return iterator, list(islice(iterator, n))
        finally:
            self._inside = _RandomState(self._inside)
            outside.replace(self._inside)

    def _seed(self) -> None:
        if not isinstance(self._begin, int):
            set_rng_states({k: self._begin[k] for k in ("torch", "python", "numpy") if k in self._begin})
            return
        seed = self._begin % 2**32  # numpy takes no more
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed)


class _RandomState:
    """Torch's, Python's and NumPy's random state now; ``known`` is the last one of the same kind."""

    def __init__(self, known: _RandomState | None) -> None:
        self._torch = torch.default_generator.get_state()
        self._python = random.getstate()
        self._numpy: NumPyState | None = None
        if "numpy" in sys.modules:
            self._numpy = NumPyState.read(None if known is None else known._numpy)

    def replace(self, current: _RandomState) -> None:
        """Put this state back in the place of the current one."""
        torch.default_generator.set_state(self._torch)
        random.setstate(self._python)
        if self._numpy is not None and current._numpy is not None:
            self._numpy.replace(current._numpy)


class ShardedSampler(Sampler[Any]):
    """One rank's share of what another sampler yields, indices or whole batches.

    Every rank draws the whole order and takes each ``num_replicas``-th item, so that one step of all ranks sees the
    samples of one step of a single process with that many times the batch. What the sampler draws from the global
    random state it draws from a private one, seeded by ``seed + epoch``, which is alike on all ranks.

    Args:
        sampler: The user's sampler.
        num_replicas: Number of ranks that share the samples.
        rank: Which of them this is.
        seed: The same on every rank.
        pad: ``True``: every rank gets equally many, samples from the beginning being repeated at the end.
            ``False``: every sample goes to exactly one rank.
        drop_last: With ``pad``, leave out the samples at the end instead of repeating some.
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
        """Items of the order, counted over all ranks, to leave out at its beginning."""
        self.source: int | Mapping[str, Any] | None = None
        """What the order is drawn from instead of ``seed + epoch``: a seed, or random states."""

    def set_epoch(self, epoch: int) -> None:
        """Seed the next order."""
        self.epoch = epoch

    def go_on(self, start: int, source: int | Mapping[str, Any] | None) -> None:
        """The next orders go on where other ranks, perhaps another number of them, have come; 0 and None undo that."""
        self.start, self.source = start, source

    def __iter__(self) -> Iterator[Any]:
        head: list[Any] = []
        rest: list[Any] = []  # what is not shared out yet
        skip, ranks = self.start, self.num_replicas
        for chunk in self._order():
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

    def _order(self) -> Iterator[list[Any]]:
        """What the sampler yields, in chunks."""
        randomness = PrivateRandomness(self.seed + self.epoch if self.source is None else self.source)
        iterator, chunk = randomness.take(lambda: iter(self.sampler), self._CHUNK)
        while chunk:
            yield chunk
            iterator, chunk = randomness.take(iterator, self._CHUNK)

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
        loader: Left alone if it is no ``DataLoader``, reads an ``IterableDataset`` (which shards itself), or has a
            ``DistributedSampler`` already.
        num_replicas: Number of ranks. With one, the loader is returned as it is.
        rank: This one.
        seed: Seeds samplers that draw from the global random state; the same on every rank.
        pad: ``True`` for training: all ranks get equally many batches. ``False`` for evaluation: every sample counts
            once, and ranks may differ by a batch.
        whole_batches: Ranks take turns with the batches of one process, instead of sharing each step's samples.
        alone: Draw the order from ``seed`` also where there is only one rank, as several would.

    Returns:
        A shallow copy of the loader with other samplers; any subclass keeps its class and attributes.
    """
    if (num_replicas == 1 and not alone) or not is_indexed(loader):
        return loader
    if any(isinstance(s, (DistributedSampler, ShardedSampler)) for s in samplers(loader)):
        return loader
    share = partial(ShardedSampler, num_replicas=num_replicas, rank=rank, seed=seed, pad=pad)
    result = copy.copy(loader)
    fields = result.__dict__  # DataLoader's __setattr__ refuses these names
    fields["_iterator"] = None  # persistent workers of the user's loader stay with it
    batch_sampler = loader.batch_sampler
    if batch_sampler is None:  # the samples are whole batches, or the user collates them
        fields["sampler"] = share(loader.sampler)
    elif type(batch_sampler) is BatchSampler and not whole_batches:
        fields["sampler"] = share(batch_sampler.sampler, drop_last=batch_sampler.drop_last and pad)
        fields["batch_sampler"] = BatchSampler(fields["sampler"], batch_sampler.batch_size, batch_sampler.drop_last)
    else:
        fields["batch_sampler"] = share(batch_sampler)
    return result


def is_indexed(loader: Any) -> bool:
    """Whether it is a ``DataLoader`` whose samples have indices, which can be shared out."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def samplers(loader: Any) -> Iterator[Any]:
    """A loader's samplers, and the samplers that those draw from."""
    for sampler in (getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)):
        while sampler is not None:
            yield sampler
            sampler = getattr(sampler, "sampler", None)


def innermost_sampler(loader: Any) -> Any:
    """The sampler that decides the order, however many others share it out and batch it; None without one."""
    sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader, "sampler", None) if sampler is None else sampler
    while (inner := getattr(sampler, "sampler", None)) is not None:
        sampler = inner
    return sampler


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell every sampler of a loader that has a ``set_epoch`` which epoch comes."""
    seen: set[int] = set()
    for sampler in samplers(loader):
        setter = getattr(sampler, "set_epoch", None)
        if callable(setter) and id(sampler) not in seen:
            seen.add(id(sampler))
            setter(epoch)


def sampler_epoch(loader: Any) -> int | None:
    """The epoch that a loader's samplers stand at; ``None`` if none keeps count."""
    for sampler in samplers(loader):
        epoch = getattr(sampler, "epoch", None)
        if callable(getattr(sampler, "set_epoch", None)) and isinstance(epoch, int):
            return epoch
    return None


def seed_workers(loader: Any, rank: int) -> Any:
    """Give a loader's workers their seeds, if ``seed_everything(workers=True)`` was called and the user has not.

    Args:
        loader: Any loader.
        rank: This process among all; workers of different ranks get different seeds.

    Returns:
        The loader, or a shallow copy with a ``worker_init_fn``.
    """
    wanted = os.environ.get("PL_SEED_WORKERS", "0") == "1"
    if not wanted or not isinstance(loader, DataLoader) or loader.worker_init_fn is not None or not loader.num_workers:
        return loader
    result = copy.copy(loader)
    result.__dict__["_iterator"] = None
    result.worker_init_fn = partial(worker_init_function, rank=rank)
    return result


def sized_len(loader: Any) -> int | None:
    """The number of batches; ``None`` if the loader cannot tell."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def has_len(loader: Any) -> bool:
    """Whether the loader can tell its number of batches."""
    return sized_len(loader) is not None
