"""Which rank gets which sample, in which order, from any position.

Start with ``loader.py`` (what ``setup_dataloaders`` returns) and ``sharding.py`` (how samples are shared out).
``samplers.py`` finds the samplers of a loader, ``order.py`` keeps the order of samples independent of the number of
ranks, ``epochs.py`` and ``cursors/`` go on from any position, ``resumable.py`` is the loader whose position is saved,
and ``combined/`` iterates several loaders as one. Imports strategies and what is below them.
"""

from treadle_fabric.data.combined import CombinedLoader
from treadle_fabric.data.epochs import Epochs
from treadle_fabric.data.loader import FabricDataLoader, WrappedLoader, share_loader
from treadle_fabric.data.resumable import ResumableDataLoader, wrap_loader
from treadle_fabric.data.samplers import (
    has_len,
    sampler_epoch,
    seed_workers,
    set_epoch,
    sized_len,
)
from treadle_fabric.data.sharding import ShardedSampler, is_shared, shard_dataloader

__all__ = [
    "CombinedLoader",
    "Epochs",
    "FabricDataLoader",
    "ResumableDataLoader",
    "ShardedSampler",
    "WrappedLoader",
    "has_len",
    "is_shared",
    "sampler_epoch",
    "seed_workers",
    "set_epoch",
    "shard_dataloader",
    "share_loader",
    "sized_len",
    "wrap_loader",
]
