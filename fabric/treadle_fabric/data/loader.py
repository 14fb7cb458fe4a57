"""The loaders that ``Fabric.setup_dataloaders`` returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from treadle_fabric.batches import batch_mover
from treadle_fabric.data.samplers import sampler_epoch, seed_workers, set_epoch
from treadle_fabric.data.sharding import shard_dataloader
from treadle_fabric.randomness.seeds import global_seed
from treadle_fabric.strategies import Strategy

__all__ = ["FabricDataLoader", "WrappedLoader", "share_loader"]


def share_loader(
    loader: Any,
    strategy: Strategy,
    *,
    share: bool,
    pad: bool = True,
    whole_batches: bool = False,
    alone: bool = False,
) -> Any:
    """This rank's share of a loader, as its strategy wants it, with seeds for its workers.

    Args:
        loader: The user's loader, any iterable of batches.
        strategy: Tells the number of ranks, and may replace the loader.
        share: Whether to share the samples out among the ranks.
        pad: As in :func:`shard_dataloader`, like the next two.
        whole_batches: Ranks take turns with whole batches.
        alone: Draw the order as several ranks do, also where there is one.
    """
    ranks = strategy.distributed_sampler_kwargs or ({"num_replicas": 1, "rank": 0} if alone else None)
    if share and ranks is not None:
        loader = shard_dataloader(
            loader, seed=global_seed(), pad=pad, whole_batches=whole_batches, alone=alone, **ranks
        )
    # ranks that work on one share of the samples draw the same augmentations
    return seed_workers(strategy.process_dataloader(loader), strategy.data_parallel_rank)


class WrappedLoader(ABC):
    """A loader whose batches arrive on the device, with all other attributes of the loader inside.

    Args:
        dataloader: Any iterable of batches.
        device: The device that batches are moved to. ``None``: they are not moved.
    """

    def __init__(self, dataloader: Any, device: torch.device | None = None) -> None:
        self._dataloader = dataloader
        self._device = device
        self._epoch = 0
        self._known_epoch = sampler_epoch(dataloader)

    @property
    def device(self) -> torch.device | None:
        """The device that batches are moved to; ``None``: they are not moved."""
        return self._device

    @property
    def dataloader(self) -> Any:
        """The loader inside."""
        return self._dataloader

    @abstractmethod
    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch that the next iteration is, counted from 0."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int:
        return len(self._dataloader)

    def __getattr__(self, name: str) -> Any:
        if name == "_dataloader":  # not there yet: being copied or unpickled
            raise AttributeError(name)
        return getattr(self._dataloader, name)

    def _tell_samplers(self, epoch: int) -> None:
        self._epoch = epoch
        set_epoch(self._dataloader, epoch)
        self._known_epoch = sampler_epoch(self._dataloader)

    def _told_epoch(self) -> int | None:
        """The epoch that the user has set at a sampler since the last iteration; None if the user has not."""
        current = sampler_epoch(self._dataloader)
        return None if current == self._known_epoch else current


class FabricDataLoader(WrappedLoader):
    """A loader whose batches arrive on the device.

    Each iteration is an epoch, whose number is given to samplers that have a ``set_epoch``. Where the user sets the
    epoch of a sampler, counting goes on from that number.

    Args:
        dataloader: Any iterable of batches.
        device: The device that batches are moved to. ``None``: they are not moved.
    """

    def set_epoch(self, epoch: int) -> None:
        self._tell_samplers(epoch)

    def __iter__(self) -> Iterator[Any]:
        self._tell_samplers(self._epoch if (told := self._told_epoch()) is None else told)
        self._epoch += 1
        if self._device is None:
            return iter(self._dataloader)
        return map(batch_mover(self._device), self._dataloader)
