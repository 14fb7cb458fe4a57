"""What the cursors of a single loader have in common: what each epoch is drawn from, and how that is put back."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch

from treadle_fabric.data.combined import CombinedLoader
from treadle_fabric.data.cursors.cursor import Cursor
from treadle_fabric.data.cursors.orders import PrivateOrder
from treadle_fabric.data.samplers import generators_of
from treadle_fabric.data.streams import PrivateStream
from treadle_fabric.errors import CheckpointMismatchError
from treadle_fabric.randomness import (
    as_own_rng_states,
    generator_state,
    own_rng_states,
    set_generator_state,
    set_rng_states,
)

__all__ = ["OneLoaderCursor"]


class OneLoaderCursor(Cursor):
    """A cursor of one loader.

    Args:
        loader: Any iterable of batches.
        rank: This process; workers of different ranks draw different numbers.
        private: What draws the order of the loader, where that is a sampler of the user's own class.
    """

    def __init__(self, loader: Any, rank: int, *, private: PrivateOrder | None = None) -> None:
        super().__init__()
        self._loader, self._rank, self._private = loader, rank, private
        parts = loader.flattened if isinstance(loader, CombinedLoader) else [loader]
        self._generators = generators_of(part.stream if isinstance(part, PrivateStream) else part for part in parts)
        self._key = 0
        """A number that differs from epoch to epoch and from rank to rank, and seeds what is not the order."""
        self._rng: dict[str, Any] = {}
        self._warm = False
        """Whether the order of this epoch was drawn with workers at hand, who took no new seed for it."""
        self._drawn_from: list[Any] = []

    @property
    @final
    def drawn_from(self) -> int | dict[str, Any]:
        if self._private is not None:
            return self._key
        if not self._rng or self._warm or getattr(self._loader, "generator", None) is not None:
            return self._rng
        generator = torch.Generator()
        generator.set_state(self._rng["torch"])
        if torch.get_default_device().type == "cpu":  # there a DataLoader draws its workers' seed first
            torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator)
        return {**self._rng, "torch": generator.get_state()}

    @final
    def take_generators(self, state: dict[str, Any], *, within: bool) -> None:
        self._check(state)
        self._set_generators(state["generators" if within else "generators_now"])

    def _set_generators(self, states: list[Any]) -> None:
        for generator, state in zip(self._generators, states):
            set_generator_state(generator, state)

    @final
    def _check(self, state: dict[str, Any]) -> None:
        if "key" not in state:
            raise CheckpointMismatchError(
                "The checkpoint was saved with several training loaders combined, and here is one. Resume with the"
                " loaders that it was saved with."
            )

    @final
    def _iterate(self, epoch: int, skip: int, resumed: dict[str, Any]) -> Iterator[Any]:
        by_torch = self.skips_by_index and self._private is None
        now = {"torch": torch.get_rng_state()} if by_torch else own_rng_states()
        if resumed:
            self._key, self._warm = resumed["key"], resumed["warm"]
            self._rng = as_own_rng_states(resumed["rng"], self._rank)
            self._drawn_from = resumed["generators"]
            self._set_generators(self._drawn_from)
        else:
            self._rng = now
            self._drawn_from = [generator_state(g) for g in self._generators]
            self._key = zlib.crc32(b"%d" % epoch + now["torch"].numpy().tobytes()) * 4096 + self._rank
        if self._private is not None:
            self._private.begin(self._key)
        return self._batches(skip, resumed, now)

    @abstractmethod
    def _batches(self, skip: int, resumed: dict[str, Any], now: dict[str, Any]) -> Iterator[Any]:
        """The batches of the epoch that has begun.

        Args:
            skip: The number of batches to leave out at the beginning.
            resumed: The state of the epoch, where it is a resumed one.
            now: The random states of the process.
        """

    @contextmanager
    def _order_drawn_again(self, resumed: dict[str, Any], now: dict[str, Any]) -> Iterator[None]:
        """Inside, a resumed epoch has the random states of its begin; afterwards, those of ``now`` are back."""
        if resumed:
            set_rng_states({kind: self._rng[kind] for kind in now if kind in self._rng})
        yield
        if resumed:
            set_rng_states(now)
            if not self._ahead:  # others that draw from the same generators have gone on
                self._set_generators(resumed["generators_now"])

    @final
    def _state(self, position: int) -> dict[str, Any]:
        state: dict[str, Any] = {"key": self._key, "rng": self._rng, "warm": self._warm}
        state["generators"] = self._drawn_from
        state["generators_now"] = [generator_state(g) for g in self._generators]
        return {**state, **self._loader_state(position)}

    def _loader_state(self, position: int) -> dict[str, Any]:
        """What :meth:`_state` is to have of the loader itself: its own state, say, as ``{"loader": ...}``."""
        return {}

    @final
    def _follow(self, state: dict[str, Any], *, ended: bool, whole: bool) -> None:
        self.take_generators(state, within=False)
        self._rng = as_own_rng_states(state["rng"], self._rank)
        self._end_loader(state, ended=ended, whole=whole)

    def _end_loader(self, state: dict[str, Any], *, ended: bool, whole: bool) -> None:
        """Bring the loader itself to the end of the epoch of ``state``; the arguments are those of :meth:`_follow`."""
