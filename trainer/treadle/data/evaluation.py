"""The batches of an evaluation or a prediction: shared out over the ranks and limited."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from treadle.data.find import check_loader, first_loader, sequential, with_last_batch
from treadle.data.lengths import has_exact_length, is_empty, unlimited
from treadle.data.limits import limit_batches
from treadle.data.lookahead import Lookahead
from treadle_fabric import Fabric, MisconfigurationException, rank_zero_warn
from treadle_fabric.data import (
    CombinedLoader,
    RecordedSampler,
    is_shared,
    record_order,
    set_epoch,
    several_loaders,
    share_loader,
    sized_len,
)

__all__ = ["EvaluationData"]


class EvaluationData:
    """The loaders of a validation, a test or a prediction, one after the other.

    Args:
        loaders: The user's loader or loaders.
        fabric: Tells the number of ranks.
        limit: The limit of batches of a loader: a number, or a fraction.
        name: The name of the loaders' argument or hook, for messages.
        inject: Whether to share the samples out among the ranks.
        overfit: Whether to turn the shuffling off.
    """

    def __init__(
        self, loaders: Any, fabric: Fabric, *, limit: float, name: str, inject: bool, overfit: bool = False
    ) -> None:
        self._fabric, self._inject, self._overfit = fabric, inject, overfit
        self._name, self._limit = name, limit
        self._records = False
        self.indices: list[Any] | None = None
        """The indices of the samples of the batch that came last; None where :meth:`record` was not called, and of
        loaders whose samples have no indices."""
        self._take(loaders)

    def renew(self, loaders: Any) -> None:
        """Take other loaders, the same number of them: they are made anew where their batch size has changed.

        Raises:
            MisconfigurationException: The number of loaders is another one.
        """
        before = len(self.loaders)
        self._take(loaders)
        if len(self.loaders) != before:
            raise MisconfigurationException(
                f"{self._name} were {before} loaders, and are {len(self.loaders)} with another batch size: the number"
                " must not depend on the batch size."
            )

    def _take(self, loaders: Any) -> None:
        fabric, name, inject = self._fabric, self._name, self._inject
        share = partial(share_loader, strategy=fabric.strategy, share=inject, pad=False)
        self.combined: CombinedLoader | None = None
        if isinstance(loaders, CombinedLoader) and loaders.mode != "sequential":
            self.combined = loaders = copy.copy(loaders)  # the user's stays as it is
            self.loaders = [loaders]
            for part in loaders.flattened:
                check_loader(part, name)
            loaders.flattened = [share(p) for p in loaders.flattened]
        else:
            if isinstance(loaders, CombinedLoader):
                found = list(loaders.flattened)
            elif isinstance(loaders, Mapping):
                found = list(loaders.values())
            else:
                found = several_loaders(loaders) or [loaders]
            for loader in found:
                check_loader(loader, name)
            if self._overfit:
                found = [sequential(loader) for loader in found]
            predicts = name.startswith("predict")
            if predicts:
                found = [with_last_batch(loader) for loader in found]
            self.loaders = [share(p, whole_batches=predicts) for p in found]  # whose outputs are put in order again
        self.num_batches: list[float] = []
        for i, loader in enumerate(self.loaders):
            length = sized_len(loader)
            if length == 0 and fabric.world_size == 1:
                rank_zero_warn(f"{is_empty(loader)}: nothing is evaluated on loader {i} of {name}.")
            self.num_batches.append(limit_batches(length, self._limit, f"limit_{name.split('_')[0]}_batches"))

    def is_shared(self, loader_idx: int) -> bool:
        """Whether the ranks share the samples of a loader out."""
        return is_shared(self.loaders[loader_idx])

    def record(self) -> None:
        """Tell the indices of the samples of each batch, in :attr:`indices`."""
        self._records = True

    def iterate(self, loader_idx: int, epoch: int, limit: float) -> Iterator[tuple[int, Any, bool]]:
        """The first ``limit`` batches of one loader, each with its number and whether it is the last."""
        loader = self.loaders[loader_idx]
        for part in self.combined.flattened if self.combined is not None else [loader]:
            set_epoch(part, epoch)
        recorded, order = record_order(loader) if self._records else (loader, None)
        batches = first_loader(iter(loader)) if self.combined is not None else iter(recorded)
        batches = self._with_indices(batches, order) if self._records else batches
        length = sized_len(loader)
        if limit == length and not has_exact_length(loader) and unlimited(self._limit, length):
            limit = math.inf  # a stream may have more batches than it says
        return iter(Lookahead(batches, 0, limit, f"of {self._name} ({loader_idx})"))

    def _with_indices(self, batches: Iterator[Any], order: RecordedSampler | None) -> Iterator[Any]:
        for batch in batches:
            self.indices = None if order is None else order.take()
            yield batch
