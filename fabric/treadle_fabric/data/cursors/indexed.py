"""Go to a position by dropping indices: a DataLoader over indexed samples that loads in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch.utils.data import DataLoader

from treadle_fabric.data.cursors.one_loader import OneLoaderCursor
from treadle_fabric.data.cursors.orders import RestOfOrder, with_private_order
from treadle_fabric.data.samplers import index_sampler, with_sampler
from treadle_fabric.randomness import generator_state

__all__ = ["IndexedCursor"]


@final
class IndexedCursor(OneLoaderCursor):
    """Draws the order of an epoch anew and leaves out the indices before the position; nothing is loaded for that.

    Args:
        loader: The loader.
        rank: This process.
        among_others: Whether others draw random numbers between the begin of an epoch and its first batch. The
            numbers are then drawn in the order in which a loop over all loaders, written by hand, draws them.
    """

    skips_by_index = True

    def __init__(self, loader: DataLoader[Any], rank: int, *, among_others: bool) -> None:
        loader, private = with_private_order(loader)
        super().__init__(loader, rank, private=private)
        self._among_others = among_others
        self.ends_without_drawing = private is None and not self._generators

    def _batches(self, skip: int, resumed: dict[str, Any], now: dict[str, Any]) -> Iterator[Any]:
        loader = self._loader
        if not resumed:
            self._warm = False
            if not skip:
                if self._among_others:  # all of which begin, before any draws the order with its first batch
                    loader = with_sampler(loader, RestOfOrder(index_sampler(loader), 0, self._note_order))
                return iter(loader)
        with self._order_drawn_again(resumed, now):
            rest = RestOfOrder(index_sampler(loader), skip)
            other = with_sampler(loader, rest)
            if self._warm:  # the order was drawn later than the workers' seed
                other.__dict__["generator"] = torch.Generator()
            iterator: Iterator[Any] = iter(other)
            rest.begin()  # draws the order before the random state goes on
        return iterator

    def _note_order(self) -> None:
        """Note what the order is drawn from, now that it is; the workers' seed was drawn before."""
        self._drawn_from = [generator_state(g) for g in self._generators]
        if self._private is None:
            self._rng, self._warm = {"torch": torch.get_rng_state()}, True
