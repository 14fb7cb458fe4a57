"""The training batches of a run: shared out over the ranks, limited, from any position."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from treadle.data.find import check_loader, first_loader, sequential
from treadle.data.lengths import describe, has_exact_length, is_empty, unlimited
from treadle.data.limits import limit_batches
from treadle.data.lookahead import Lookahead
from treadle_fabric import Fabric, MisconfigurationException, all_gather_objects, rank_zero_warn
from treadle_fabric.data import (
    CombinedLoader,
    Epochs,
    is_stream,
    keeps_position,
    several_loaders,
    share_loader,
    sized_len,
)

__all__ = ["TrainingData"]


class TrainingData:
    """The training batches: those of one loader, or of several combined.

    Args:
        loader: The user's loader or loaders.
        fabric: Tells the number of ranks.
        limit: ``limit_train_batches``, or ``overfit_batches``.
        overfit: Whether every epoch is to have the same batches, in the same order.
        inject: Whether to share the samples out among the ranks.
    """

    def __init__(self, loader: Any, fabric: Fabric, *, limit: float, overfit: bool, inject: bool) -> None:
        several = isinstance(loader, Mapping) or several_loaders(loader) is not None
        combined = copy.copy(loader) if isinstance(loader, CombinedLoader) else None  # the user's stays as it is
        combined = CombinedLoader(loader, "max_size_cycle") if several else combined
        parts = list(combined.flattened) if combined is not None else [loader]
        for part in parts:
            check_loader(part, "train_dataloaders")
        if overfit:
            parts = [sequential(part) for part in parts]
        self._fabric, self._inject = fabric, inject
        self.combined = combined
        loader, parts = self._share_out(parts)
        length = sized_len(loader)
        if length == 0 and fabric.world_size == 1:
            rank_zero_warn(
                f"{is_empty(parts[0])}: nothing is trained. Give it more samples, a smaller batch_size, or"
                " drop_last=False."
            )
        elif length == 0:
            raise MisconfigurationException(
                f"train_dataloaders is empty: {describe(parts[0])} gives no batch on rank {fabric.global_rank}."
                " Give it more samples, a smaller batch_size, or drop_last=False."
            )
        name = "overfit_batches" if overfit else "limit_train_batches"
        self.num_batches = limit_batches(length, limit, name)
        self.exact = length is not None and all(has_exact_length(p) for p in parts)
        """Whether the length is reliable; a stream may have fewer batches than it says."""
        self._stream = is_stream(loader) and not keeps_position(loader)
        """Whether batches are made while training goes on; what a loader with a state of its own saves at its last
        batch may mean the beginning of the next epoch, so that it is asked ahead."""

        self.whole = self.num_batches in (length, math.inf)
        """Whether an epoch is the whole loader: then it is iterated to its end, where samplers may draw once more."""
        self._agrees = self._told = False
        if fabric.world_size > 1:
            self._agree_on_length()
        self._stop = math.inf if not self.exact and unlimited(limit, length) else self.num_batches
        self.epochs = Epochs(
            loader,
            parts,
            rank=fabric.strategy.data_parallel_rank,
            world_size=fabric.strategy.data_parallel_size,
            num_batches=self.num_batches,
            exact=self.exact,
            whole=self.whole,
            share_alone=self._share_alone,
        )
        """Iterates epochs from any position, and gives the state of a position."""

    @property
    def loader(self) -> Any:
        """This rank's share of the loader."""
        return self.epochs.loader

    @property
    def shown(self) -> Any:
        """The same in the structure in which the user gave several loaders."""
        return self.loader if self.combined is None else self.combined.iterables

    @property
    def stop(self) -> float:
        """The most batches that the epoch that is iterated can have."""
        return self._stop if self.epochs.end is None else self.epochs.end

    def has_ended(self, position: int) -> bool:
        """Whether nothing is left of an epoch that was resumed with another number of processes or batch size."""
        return self.epochs.end is not None and 0 < self.epochs.end <= position

    def _share_out(self, parts: Sequence[Any], *, alone: bool = False) -> tuple[Any, list[Any]]:
        """This rank's share of the loader, and of each of its parts."""
        shares = [share_loader(p, self._fabric.strategy, share=self._inject, alone=alone) for p in parts]
        if self.combined is None:
            return shares[0], shares
        self.combined.flattened = shares
        return self.combined, shares

    def _share_alone(self) -> tuple[Any, list[Any]]:
        return self._share_out(self.epochs.parts, alone=True)

    def _agree_on_length(self) -> None:
        """All ranks train on the number of batches of the rank with the fewest; streams agree batch by batch."""
        known = -1 if self.num_batches == math.inf else int(self.num_batches)
        lengths, exact = zip(*all_gather_objects(self._fabric, (known, self.exact)), strict=True)
        if not all(exact):
            self._agrees, self.exact = True, False
            self.num_batches = math.inf if min(lengths) < 0 else min(lengths)
        elif min(lengths) != max(lengths):
            rank_zero_warn(
                f"The ranks have {', '.join(map(str, lengths))} training batches: an epoch ends after"
                f" {min(lengths)}, for all. Give each rank the same number of samples, or leave sharing them out to the"
                " Trainer (use_distributed_sampler=True)."
            )
            self.num_batches, self.whole = min(lengths), False

    @property
    def knows_last(self) -> bool:
        """Whether each epoch's last batch is known as the last, by its number or because one batch is fetched ahead.

        A stream in one process is asked for a batch when training has come to it, as in a hand-written loop: it may
        draw from the global generators, or read the model's weights.
        """
        return self.exact or self._agrees or not self._stream

    def iterate(
        self, epoch: int, skip: int = 0, *, steps: Callable[[int], bool] | None = None, saves_early: bool = False
    ) -> Iterator[tuple[int, Any, bool]]:
        """The batches of an epoch after the first ``skip``, in the order of the epoch.

        Each comes with its number, and with whether it is known to be the last of the epoch on all ranks.

        Args:
            epoch: The number of the epoch.
            skip: The number of batches to leave out.
            steps: Tells whether an optimizer steps after the batch of a number, be it the last or not; one batch is
                fetched ahead where that depends on whether another batch comes. Default: it steps after each.
            saves_early: Whether a checkpoint may be saved after a batch was fetched, and before it is trained on.
        """
        ahead: Callable[[int], bool] | None = None
        if not self.exact and (self.knows_last or steps is not None):
            ahead = (lambda number: True) if self.knows_last or steps is None else (lambda number: not steps(number))
        early = ahead is not None or (saves_early and self._stream)
        batches = self.epochs.iterate(epoch, skip, ahead=early)
        if self.combined is not None:
            batches = first_loader(batches)
        agree = partial(self._all_have_more, epoch) if self._agrees else None
        what = f"of epoch {epoch} from the training loader"
        drain = self.exact and self.whole and not self.epochs.ends_without_drawing
        return iter(Lookahead(batches, skip, self.stop, what, ahead=ahead, drain=drain, agree=agree))

    def _all_have_more(self, epoch: int, index: int, more: bool) -> bool:
        """Whether every rank has a batch with the number ``index``; every rank calls this.

        The hosts agree among themselves, while the devices are still busy with the steps before.
        """
        world_size = self._fabric.world_size
        having = self._fabric.strategy.begin_vote(more)()
        if 0 < having < world_size and not self._told:
            self._told = True
            rank_zero_warn(
                f"{world_size - having} of {world_size} ranks had no more than {index} training batches in epoch"
                f" {epoch}: it ends there for all, and what the others have left is not used. The same goes for later"
                " epochs."
            )
        return having == world_size
