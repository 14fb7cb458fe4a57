"""Several dataloaders iterated as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any, Literal, TypeAlias

from treadle_fabric.checks import is_list
from treadle_fabric.containers import children, leaves, map_leaves, with_children
from treadle_fabric.data.samplers import sized_len
from treadle_fabric.errors import CheckpointMismatchError, MisconfigurationException

__all__ = ["CombinedLoader", "CombinedLoaderMode"]

CombinedLoaderMode: TypeAlias = Literal["min_size", "max_size", "max_size_cycle", "sequential"]
Item: TypeAlias = tuple[Any, int, int]

_END: Any = object()


class CombinedLoader:
    """Iterates over several loaders, side by side or one after the other.

    Each item is ``(batch, batch_idx, dataloader_idx)``. Side by side, ``batch`` has the structure of ``iterables`` with
    one batch in the place of each loader, and ``dataloader_idx`` is 0.

    - ``"min_size"``: side by side until the shortest loader ends.
    - ``"max_size"``: until the longest ends; a loader that has ended gives ``None``.
    - ``"max_size_cycle"``: until the longest ends; a loader that has ended starts again (``None`` if it is empty, or a
      generator, which cannot start again).
    - ``"sequential"``: one loader after the other; ``dataloader_idx`` says which, ``batch_idx`` counts within it.

    Args:
        iterables: A loader, or lists, tuples and dictionaries of loaders, nested at will. A list of plain numbers or
            strings is itself a loader.
        mode: One of the above.

    Example:
        >>> list(CombinedLoader({"a": range(2), "b": range(3)}, "max_size"))
        [({'a': 0, 'b': 0}, 0, 0), ({'a': 1, 'b': 1}, 1, 0), ({'a': None, 'b': 2}, 2, 0)]
    """

    def __init__(self, iterables: Any, mode: CombinedLoaderMode = "min_size") -> None:
        if mode not in _WALKS:
            raise MisconfigurationException(f"mode={mode!r} is not one of {', '.join(map(repr, _WALKS))}.")
        self._iterables = iterables = _in_lists_and_dicts(iterables)
        self._flattened = list(leaves(iterables, _is_leaf))
        self._shape = map_leaves(iterables, lambda _: object(), _is_leaf)
        self._mode: CombinedLoaderMode = mode
        self._limits: list[int | float] | None = None
        self._running: Generator[Item] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": None}

    @property
    def mode(self) -> CombinedLoaderMode:
        """How the loaders are combined."""
        return self._mode

    @property
    def iterables(self) -> Any:
        """The loaders in the structure they were given in."""
        return self._iterables

    @property
    def flattened(self) -> list[Any]:
        """The loaders as a flat list. Assigning a list of the same length replaces them within the structure."""
        return self._flattened

    @flattened.setter
    def flattened(self, loaders: Sequence[Any]) -> None:
        if len(loaders) != len(self._flattened):
            raise MisconfigurationException(
                f"{len(loaders)} loaders cannot replace the {len(self._flattened)} of this CombinedLoader. "
                "Give one for each."
            )
        self._iterables = self._rebuilt(iter(loaders))
        self._flattened = list(loaders)

    @property
    def sampler(self) -> Any:
        """The samplers of the loaders, in the same structure; ``None`` for a loader that has none."""
        return self._rebuilt(getattr(loader, "sampler", None) for loader in self._flattened)

    @property
    def batch_sampler(self) -> Any:
        """The batch samplers of the loaders, in the same structure; ``None`` for a loader that has none."""
        return self._rebuilt(getattr(loader, "batch_sampler", None) for loader in self._flattened)

    @property
    def limits(self) -> list[int | float] | None:
        """The most batches to take of each loader. Assigning one number sets all limits, ``None`` removes them."""
        return self._limits

    @limits.setter
    def limits(self, limits: float | Sequence[int | float] | None) -> None:
        if limits is None:
            self._limits = None
            return
        given = [limits] * len(self._flattened) if isinstance(limits, int | float) else list(limits)
        if len(given) != len(self._flattened):
            raise MisconfigurationException(
                f"{len(given)} limits were given for {len(self._flattened)} loaders. Give one number, or one for each."
            )
        for limit in given:
            if limit < 0 or (limit != math.inf and limit != int(limit)):
                raise MisconfigurationException(f"A limit of {limit} batches is not a whole number, nor infinite.")
        self._limits = given

    def __len__(self) -> int:
        """The number of items of one pass.

        A loader of unknown length counts as endless, so that an endless loader can go beside a sized one.

        Raises:
            TypeError: The length is unknown, or endless.
        """
        lengths = self._lengths()
        if not lengths:
            return 0
        if self._mode == "sequential":
            total = sum(lengths)
        else:
            total = min(lengths) if self._mode == "min_size" else max(lengths)
        if total == math.inf:
            sized = zip(self._flattened, lengths, strict=True)
            unknown = [type(loader).__name__ for loader, length in sized if length == math.inf]
            raise TypeError(
                f"The length of this CombinedLoader is unknown, because {', '.join(unknown)} has no length. Give the "
                "loader (or its IterableDataset) a __len__, or limit its batches."
            )
        return int(total)

    def __iter__(self) -> Iterator[Item]:
        return self.iterate_from(0, [0] * len(self._flattened), lambda index, skip: iter(self._flattened[index]))

    def iterate_from(
        self, item: int, skips: Sequence[int], begin: Callable[[int, int], Iterator[Any]]
    ) -> Iterator[Item]:
        """A pass from an item on.

        Args:
            item: The number of items to leave out.
            skips: For each loader, the number of batches that its first iterator leaves out: see :meth:`places`.
            begin: Gets the index of a loader and the number of batches to leave out, and gives an iterator.
        """
        first = dict(enumerate(skips))

        def start(index: int) -> Iterator[Any]:
            skip = first.pop(index, 0)
            limit = math.inf if self._limits is None else self._limits[index]
            if limit == 0:
                return iter(())  # starting the loader would start its workers
            iterator = begin(index, skip)
            return iterator if limit == math.inf else islice(iterator, int(limit) - skip)

        self._running = _WALKS[self._mode](self, start, item)
        return self._running

    def places(self, item: int) -> list[tuple[int, int] | None]:
        """The position of each loader before an item; every loader needs a length.

        Returns:
            For each loader the number of passes that are done, and of batches in the one after them; None where the
            loader has not been begun.
        """
        found: list[tuple[int, int] | None] = []
        for length in map(int, self._lengths()):
            if self._mode == "sequential":
                found.append((0, min(item, length)) if item > 0 or not found else None)
                item -= length
            elif self._mode == "max_size_cycle" and 0 < length < item:
                passes = (item - 1) // length
                found.append((passes, item - passes * length))
            elif self._mode == "max_size" and item > length:
                found.append((1, 0))
            else:
                found.append((0, min(item, length)))
        return found

    def reset(self) -> None:
        """End the running pass and the workers, persistent ones included."""
        if self._running is not None:
            self._running.close()
            self._running = None
        for loader in self._flattened:
            loader = getattr(loader, "dataloader", loader)
            if getattr(loader, "_iterator", None) is not None:
                loader._iterator = None  # where torch's DataLoader keeps its persistent workers

    def state_dict(self) -> dict[str, Any]:
        """The state of each loader that has one, in the order of :attr:`flattened`."""
        return {"loaders": [loader.state_dict() if _has(loader, "state_dict") else None for loader in self._flattened]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Hand the states back to the loaders. Takes effect at the next pass."""
        states = state_dict["loaders"]
        if len(states) != len(self._flattened):
            raise CheckpointMismatchError(
                f"The state holds {len(states)} loaders, this CombinedLoader has {len(self._flattened)}. "
                "Resume with the loaders that the checkpoint was written with."
            )
        for loader, state in zip(self._flattened, states, strict=True):
            if state is not None and _has(loader, "load_state_dict"):
                loader.load_state_dict(state)

    def _rebuilt(self, items: Iterator[Any]) -> Any:
        """The structure of the loaders, with the next item in the place of each."""
        return map_leaves(self._shape, lambda _: next(items))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._iterables!r}, mode={self._mode!r})"

    def _lengths(self) -> list[float]:
        sizes = [sized_len(loader) for loader in self._flattened]
        limits = self._limits or [math.inf] * len(sizes)
        return [min(math.inf if size is None else size, limit) for size, limit in zip(sizes, limits, strict=True)]


Start: TypeAlias = Callable[[int], Iterator[Any]]


def _sequential(combined: CombinedLoader, start: Start, item: int) -> Generator[Item]:
    begun = [place for place in combined.places(item) if place is not None] if item else [(0, 0)]
    current, (_, skipped) = len(begun) - 1, begun[-1]
    for dataloader_idx in range(current, len(combined.flattened)):
        for batch_idx, batch in enumerate(start(dataloader_idx), skipped):
            yield batch, batch_idx, dataloader_idx
        skipped = 0


def _min_size(combined: CombinedLoader, start: Start, item: int) -> Generator[Item]:
    iterators = [start(i) for i in range(len(combined.flattened))]
    for batch_idx, batches in enumerate(zip(*iterators), item):
        yield combined._rebuilt(iter(batches)), batch_idx, 0


def _max_size(combined: CombinedLoader, start: Start, item: int) -> Generator[Item]:
    over = [item > length for length in combined._lengths()] if item else [False] * len(combined.flattened)
    iterators = [iter(()) if ended else start(i) for i, ended in enumerate(over)]
    for batch_idx in count(item):
        batches = [next(iterator, _END) for iterator in iterators]
        if all(batch is _END for batch in batches):
            return
        yield combined._rebuilt(None if batch is _END else batch for batch in batches), batch_idx, 0


def _max_size_cycle(combined: CombinedLoader, start: Start, item: int) -> Generator[Item]:
    iterators = [start(i) for i in range(len(combined.flattened))]
    ended = [item > length for length in combined._lengths()] if item else [False] * len(iterators)
    for batch_idx in count(item):
        batches = [next(iterator, _END) for iterator in iterators]
        ended = [before or batch is _END for before, batch in zip(ended, batches, strict=True)]
        if all(ended):
            return
        for i, batch in enumerate(batches):
            if batch is _END:
                iterators[i] = start(i)
                batches[i] = next(iterators[i], None)
        yield combined._rebuilt(iter(batches)), batch_idx, 0


_WALKS: dict[str, Callable[[CombinedLoader, Start, int], Generator[Item]]] = {
    "min_size": _min_size,
    "max_size": _max_size,
    "max_size_cycle": _max_size_cycle,
    "sequential": _sequential,
}


def _is_leaf(tree: Any) -> bool:
    """Whether it is a loader: no container, or a container of plain values."""
    if not is_list(tree) and not isinstance(tree, Mapping):
        return True
    return all(isinstance(child, (bool, int, float, str, bytes)) for _, child in children(tree) or ())


def _in_lists_and_dicts(tree: Any) -> Any:
    """The same structure of loaders, where it came in other lists and mappings, such as those of omegaconf."""
    if _is_leaf(tree):
        return tree
    if not isinstance(tree, (list, tuple, dict)):
        tree = dict(tree) if isinstance(tree, Mapping) else list(tree)
    changed = {key: new for key, old in children(tree) or () if (new := _in_lists_and_dicts(old)) is not old}
    return with_children(tree, changed) if changed else tree


def _has(loader: Any, method: str) -> bool:
    return callable(getattr(loader, method, None))
