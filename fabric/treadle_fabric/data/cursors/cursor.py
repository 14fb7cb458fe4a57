"""The batches of an epoch from any position on, with the same randomness as if the ones before had been loaded.

A DataLoader over an indexed dataset skips by index arithmetic: its order is drawn anew, the indices before the
position are dropped, nothing is loaded. What its workers draw is seeded by batch, so that it does not depend on which
batches were loaded before. A loader with a ``state_dict`` is asked to go there itself. Anything else (streams, custom
iterables, loaders combined) is iterated up to the position; it draws from a random state of its own, so that what
training draws does not matter.
"""

from __future__ import annotations

import copy
import random
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from treadle_fabric.data.samplers import samplers_of
from treadle_fabric.errors import CheckpointMismatchError
from treadle_fabric.randomness.generators import generator_state, is_generator, set_generator_state
from treadle_fabric.randomness.private import PrivateRandomness
from treadle_fabric.randomness.state import collect_rng_states, set_rng_states

__all__ = ["Cursor"]

_CHUNK = 16
_AHEAD = 4  # positions that whoever iterates may be ahead of where training stands, and one more
_KNOWN = ("torch.utils.data", "treadle_fabric.batches")
"""Where samplers are from that draw their order when iteration begins, or from a generator."""


class Cursor:
    """Iterates a loader from a position.

    Args:
        loader: any iterable of batches.
        rank: this process; workers of different ranks draw different numbers.
        exact: whether who iterates knows the number of batches; else it looks one batch ahead.
        among_others: whether others draw random numbers between the beginning of an epoch and its first batch.
    """

    def __init__(self, loader: Any, rank: int, *, exact: bool = True, among_others: bool = False) -> None:
        self._loader, self._rank, self._among_others = loader, rank, among_others
        self._ahead: deque[tuple[int, Any]] = deque(maxlen=_AHEAD)
        self._looks_ahead = not exact
        self._stateful = (
            hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") and not _is_combined(loader)
        )
        self._indexed = (
            not self._stateful
            and isinstance(loader, DataLoader)
            and type(loader).__iter__ is DataLoader.__iter__
            and not isinstance(loader.dataset, IterableDataset)
        )
        self._plain = isinstance(loader, (list, tuple))
        self._private: _Private | None = None
        if self._indexed and not all(type(s).__module__.startswith(_KNOWN) for s in samplers_of(loader)):
            self._private = _Private(_index_sampler(loader))
            self._loader = loader = _with_sampler(loader, self._private, loader.dataset)
        self._stream: _SeededStream | None = None
        if _is_persistent_stream(loader):
            self._stream = _SeededStream(loader.dataset)
            self._loader = _with_sampler(loader, _index_sampler(loader), self._stream)
        self._numbers: _Numbered | None = None
        if self._indexed and loader.num_workers:
            self._numbers = _Numbered(_index_sampler(loader), batched=loader.batch_sampler is not None)
            self._loader = _with_sampler(loader, self._numbers, _SeededByBatch(loader.dataset))
        self._generators = _generators(loader)
        self._draws_by_torch = self._indexed and self._private is None
        self._key, self._warm, self._seeded = 0, False, False
        self._rng: dict[str, Any] = {}
        self._drawn_from: list[Any] = []
        self._resumed: dict[str, Any] = {}

    @property
    def drawn_from(self) -> int | dict[str, Any]:
        """What the order of this epoch was drawn from: a seed, or random states."""
        if self._private is not None:
            return self._key
        if not self._rng or self._warm or getattr(self._loader, "generator", None) is not None:
            return self._rng
        generator = torch.Generator()
        generator.set_state(self._rng["torch"])
        torch.empty((), dtype=torch.int64).random_(generator=generator)  # a DataLoader draws its workers' seed first
        return {**self._rng, "torch": generator.get_state()}

    @property
    def skips_by_index(self) -> bool:
        """Whether going to a position loads nothing, and a pass over the loader is all that it takes to continue it."""
        return self._indexed or self._plain

    @property
    def ends_without_drawing(self) -> bool:
        """Whether nothing happens at an epoch's end: no sampler draws once more, and no worker is to be told."""
        return self._draws_by_torch and not self._generators and not self._loader.num_workers

    def _check(self, state: dict[str, Any]) -> None:
        if "key" not in state:
            raise CheckpointMismatchError(
                "The checkpoint was saved with several training loaders combined, and here is one. Resume with the"
                " loaders that it was saved with."
            )

    def take_generators(self, state: dict[str, Any], *, within: bool) -> None:
        """Give the user's generators what they had when the epoch of ``state`` began, or after it."""
        self._check(state)
        self._set_generators(state["generators" if within else "generators_now"])

    def _set_generators(self, states: list[Any]) -> None:
        for generator, state in zip(self._generators, states):
            set_generator_state(generator, state)

    def state_dict(self, position: int) -> dict[str, Any]:
        """What the position in this epoch means: the random state that its order was drawn from.

        Args:
            position: how many batches of the epoch are done with.
        """
        if self._resumed:  # and not iterated yet
            return self._resumed
        state: dict[str, Any] = {"key": self._key, "rng": self._rng, "warm": self._warm}
        state["generators"] = self._drawn_from
        state["generators_now"] = [generator_state(g) for g in self._generators]
        if self._stateful:
            known = [at for count, at in self._ahead if count == position]
            state["loader"] = known[0] if known else self._loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], *, within: bool = True, whole: bool = True) -> None:
        """The next iteration continues the epoch that ``state`` is of.

        Args:
            state: of :meth:`state_dict`.
            within: False: it follows that epoch.
            whole: whether an epoch is all that the loader has.
        """
        self._check(state)
        self._resumed = state if within else {}
        if within:
            return
        self._follow(state)
        if self._stateful:
            self._end_by_itself(state, ended=whole, whole=whole)

    def _follow(self, state: dict[str, Any]) -> None:
        self.take_generators(state, within=False)
        self._rng = state["rng"]
        self._seeded = bool(self._rng)  # workers that persist have their seed since the first epoch

    def finish(self, epoch: int, skip: int, *, drain: bool, whole: bool) -> None:
        """Nothing is left of the epoch to continue but what samplers draw at its end, where it is iterated so far."""
        if self._stateful and self._resumed:
            self._end_by_itself(self._resumed, ended=False, whole=whole)
        elif self._resumed and drain:
            next(self.iterate(epoch, skip), None)
        elif self._resumed:
            self._follow(self._resumed)
        self._resumed = {}

    def leave(self) -> None:
        """An epoch that was resumed, and not iterated yet, is not continued."""
        if self._resumed:
            self.load_state_dict(self._resumed, within=False)

    def close(self) -> None:
        """End workers that persist; garbage collection would wait five seconds for each."""
        own = self._numbers is not None or self._stream is not None
        iterator = getattr(self._loader, "_iterator", None) if own else None
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader.__dict__["_iterator"] = None

    def _end_by_itself(self, state: dict[str, Any], *, ended: bool, whole: bool) -> None:
        now = collect_rng_states()
        self._loader.load_state_dict(state["loader"])
        nothing = object()
        if not ended and next(iter(self._loader), nothing) is not nothing and whole:
            self._loader.load_state_dict(state["loader"])  # it took the end of an epoch for the start of the next
        set_rng_states(now)

    def iterate(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """The batches of an epoch.

        Args:
            epoch: which.
            skip: how many to leave out at the beginning.
        """
        resumed, self._resumed = self._resumed, {}
        now = {"torch": torch.get_rng_state()} if self._draws_by_torch else collect_rng_states()
        if resumed:
            self._key, self._rng, self._warm = resumed["key"], resumed["rng"], resumed["warm"]
            self._drawn_from = resumed["generators"]
            self._set_generators(self._drawn_from)
        else:
            self._rng = now
            self._drawn_from = [generator_state(g) for g in self._generators]
            self._key = zlib.crc32(b"%d" % epoch + now["torch"].numpy().tobytes()) * 4096 + self._rank
        for keyed in (self._private, self._stream):
            if keyed is not None:
                keyed.begin(self._key)
        if self._stateful:
            return self._by_itself(resumed, skip, now)
        if self._indexed:
            batches = self._by_index(skip, now if resumed else None)
            if resumed and not self._looks_ahead:  # whoever else draws from the same generators has gone on
                self._set_generators(resumed["generators_now"])
            return batches
        return islice(self._loader, skip, None) if self._plain else self._replayed(skip)

    def _by_index(self, skip: int, now: dict[str, Any] | None) -> Iterator[Any]:
        loader, numbers = self._loader, self._numbers
        if now is None and numbers is None:
            self._warm = False
        elif now is not None:  # put back what the order is drawn from, and nothing that would stay so
            set_rng_states({kind: self._rng[kind] for kind in now if kind in self._rng})
        if numbers is not None:
            numbers.begin(self._key, skip)
            iterator = self._from_workers(now is not None)
        elif skip or now is not None or self._among_others:
            rest = _Rest(_index_sampler(loader), skip)
            other = _with_sampler(loader, rest, loader.dataset)
            if self._warm:  # there were workers that persist, which drew no seed in this epoch
                other.__dict__["generator"] = torch.Generator()
            iterator = iter(other)
            rest.begin()  # draws the order before the random state goes on
        else:
            iterator = iter(loader)
        if now is not None:
            set_rng_states(now)
        return iterator

    def _by_itself(self, resumed: dict[str, Any], skip: int, now: dict[str, Any]) -> Iterator[Any]:
        loader = self._loader
        if "loader" in resumed:
            loader.load_state_dict(resumed["loader"])
        batches = iter(loader)
        if resumed:
            set_rng_states(now)
        if not self._looks_ahead:
            return batches if "loader" in resumed else islice(batches, skip, None)
        return self._one_ahead(batches, skip)

    def _one_ahead(self, batches: Iterator[Any], count: int) -> Iterator[Any]:
        """For who looks one batch ahead: keeps the state before that one."""
        self._ahead.clear()
        while True:
            self._ahead.append((count, self._loader.state_dict()))
            try:
                batch = next(batches)
            except StopIteration:
                self._ahead.pop()
                return
            count += 1
            yield batch

    def _from_workers(self, resumed: bool) -> Iterator[Any]:
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

    def _replayed(self, skip: int) -> Iterator[Any]:
        private = PrivateRandomness(self._key)
        iterator, _ = private.take(lambda: iter(self._loader), 0)
        while skip > 0:
            private.take(iterator, min(skip, _CHUNK))
            skip -= _CHUNK
        while batch := private.take(iterator, 1)[1]:
            yield batch[0]


def _is_persistent_stream(loader: Any) -> bool:
    return (
        isinstance(loader, DataLoader)
        and isinstance(loader.dataset, IterableDataset)
        and loader.persistent_workers
        and not hasattr(loader, "state_dict")
    )


def _generators(loader: Any) -> list[Any]:
    """Those that the user gave to the loaders and their samplers, or that samplers keep under any name."""
    found: dict[int, Any] = {}
    for part in loader.flattened if _is_combined(loader) else [loader]:
        for owner in (part, *samplers_of(part)):
            for value in getattr(owner, "__dict__", {}).values():
                if is_generator(value):
                    found[id(value)] = value
    return list(found.values())


def _is_combined(loader: Any) -> bool:
    return hasattr(loader, "flattened")


def _index_sampler(loader: DataLoader[Any]) -> Any:
    return loader.batch_sampler if loader.batch_sampler is not None else loader.sampler


def _with_sampler(loader: DataLoader[Any], sampler: Any, dataset: Any) -> DataLoader[Any]:
    """A copy of any kind of DataLoader with another sampler, without running its constructor again."""
    other = copy.copy(loader)
    fields = other.__dict__
    fields["batch_sampler" if loader.batch_sampler is not None else "sampler"] = sampler
    fields["dataset"] = dataset
    fields["_iterator"] = None
    return other


class _Rest:
    """What a sampler yields after its first ``skip`` items."""

    def __init__(self, sampler: Iterable[Any], skip: int) -> None:
        self._sampler, self._skip = sampler, skip
        self._iterator: Iterator[Any] | None = None

    def begin(self) -> None:
        """Draw the order now, which samplers do with the first item."""
        iterator = iter(self._sampler)
        deque(islice(iterator, self._skip), maxlen=0)
        self._iterator = iterator if self._skip else chain(list(islice(iterator, 1)), iterator)

    def __iter__(self) -> Iterator[Any]:
        if self._iterator is None:
            self.begin()
        assert self._iterator is not None
        yield from self._iterator

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]


class _Batch(list[Any]):
    """The indices of a batch, and the seed for loading it."""

    seed = 0

    def __reduce__(self) -> Any:
        return _batch, (list(self), self.seed)


def _batch(indices: list[Any], seed: int) -> _Batch:
    batch = _Batch(indices)
    batch.seed = seed
    return batch


class _Numbered:
    """A sampler whose items carry a seed made of the epoch's key and their number."""

    def __init__(self, sampler: Any, *, batched: bool) -> None:
        self.sampler, self._batched = sampler, batched
        self._key = self._skip = 0

    def begin(self, key: int, skip: int) -> None:
        """An epoch begins, without its first ``skip`` items."""
        self._key, self._skip = key, skip

    def __iter__(self) -> Iterator[_Batch]:
        key, skip = self._key, self._skip
        for number, item in islice(enumerate(self.sampler), skip, None):
            yield _batch(item if self._batched else [item], key * 1_000_003 + number)

    def __len__(self) -> int:
        return len(self.sampler)


class _Private:
    """A sampler of the user's own class: who knows when it draws, so it does from a random state of its own."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self._key = sampler, 0

    def begin(self, key: int) -> None:
        """An epoch begins."""
        self._key = key

    def __iter__(self) -> Iterator[Any]:
        private = PrivateRandomness(self._key)
        iterator, chunk = private.take(lambda: iter(self.sampler), _CHUNK)
        while chunk:
            yield from chunk
            iterator, chunk = private.take(iterator, _CHUNK)

    def __len__(self) -> int:
        return len(self.sampler)


class _Around:
    """Stands in a loader for its dataset, and seems to be it."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name in ("_dataset", "_epoch"):  # not there yet: being unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """A ``worker_init_fn`` opens files, say, and keeps them in the dataset."""
        if name in ("_dataset", "_epoch"):
            super().__setattr__(name, value)
        else:
            setattr(self._dataset, name, value)


class _SeededStream(_Around):
    """A stream whose workers persist: they are seeded anew for each epoch, which only shared memory can tell them."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def begin(self, key: int) -> None:
        """An epoch begins."""
        self._epoch.fill_(key)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        _seed(int(self._epoch) * 1_000_003 + (info.id if info is not None else 0))
        return iter(self._dataset)


class _SeededByBatch(_Around):
    """A dataset that seeds the random state of the worker it is in before each batch."""

    def __getitems__(self, batch: _Batch) -> list[Any]:
        _seed(batch.seed)
        several = getattr(self._dataset, "__getitems__", None)
        return several(batch) if callable(several) else [self._dataset[i] for i in batch]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, _Batch):  # without automatic batching
            _seed(index.seed)
            return self._dataset[index[0]]
        return self._dataset[index]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
