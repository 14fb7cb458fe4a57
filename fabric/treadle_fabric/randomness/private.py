"""Random numbers of a loader's own, apart from the global generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from treadle_fabric.randomness.state import NumPyState, set_rng_states

__all__ = ["PrivateRandomness"]

_NOTHING: Any = object()


class PrivateRandomness:
    """A random state of its own for what draws from the global generators.

    The numbers do not depend on the global random state, and drawing them does not change it.

    Args:
        begin: A seed, or the states that ``collect_rng_states`` returned.
    """

    def __init__(self, begin: int | Mapping[str, Any]) -> None:
        self._begin = begin
        self._inside: _RandomState | None = None
        self._outside: _RandomState | None = None

    def take(self, items: Iterator[Any] | Callable[[], Iterator[Any]], n: int) -> tuple[Iterator[Any], list[Any]]:
        """Draw the next ``n`` items.

        Args:
            items: An iterator, or a function that makes one; the function may draw random numbers, too.
            n: The number of items.

        Returns:
            The iterator, and the items: fewer than ``n`` at its end.
        """
        self._outside = outside = _RandomState(self._outside)
        if self._inside is not None:
            self._inside.replace(outside)
        else:
            self._seed()
        try:
            iterator = _each(items()) if callable(items) else items
            return iterator, list(islice(iterator, n))
        finally:
            self._inside = _RandomState(self._inside)
            outside.replace(self._inside)

    def chunks(self, items: Iterable[Any], n: int) -> Iterator[list[Any]]:
        """All that an iterable yields, in lists of up to ``n``; the random state is changed once a list."""
        iterator, chunk = self.take(lambda: iter(items), n)
        while chunk:
            yield chunk
            iterator, chunk = self.take(iterator, n)

    def _seed(self) -> None:
        if not isinstance(self._begin, int):
            set_rng_states({k: self._begin[k] for k in ("torch", "python", "numpy") if k in self._begin})
            return
        seed = self._begin % 2**32  # numpy takes no more
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed)


def _each(iterator: Iterator[Any]) -> Iterator[Any]:
    """The items of an iterator, which may be the user's own and begin anew when it is asked for its iterator again."""
    while (item := next(iterator, _NOTHING)) is not _NOTHING:
        yield item


class _RandomState:
    """The random state of PyTorch, Python and NumPy at one moment.

    Args:
        known: The last one of the same kind, whose copy of NumPy's state is used again where that has not changed.
    """

    def __init__(self, known: _RandomState | None) -> None:
        self._torch = torch.default_generator.get_state()
        self._python = random.getstate()
        self._numpy: NumPyState | None = None
        if "numpy" in sys.modules:
            self._numpy = NumPyState.read(None if known is None else known._numpy)

    def replace(self, current: _RandomState) -> None:
        """Set this state; ``current`` is the one that is set now."""
        torch.default_generator.set_state(self._torch)
        random.setstate(self._python)
        if self._numpy is not None and current._numpy is not None:
            self._numpy.replace(current._numpy)
