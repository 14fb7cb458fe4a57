"""Which rank gets which sample, in which order, from any position.

Start with ``loader.py`` (what ``setup_dataloaders`` returns) and ``sharding.py`` (how samples are shared out).
``samplers.py`` finds the samplers of a loader, ``order.py`` keeps the order of samples independent of the number of
ranks, ``epochs.py`` and ``cursors/`` go on from any position, which ``resume.py`` finds, ``resumable.py`` is the loader
whose position is saved, ``several.py`` tells one loader from several, ``combined.py`` iterates several as one, and
``streams.py`` tells what makes its batches while training goes on. At ``meeting.py`` ranks with unequal numbers of
batches meet. Imports strategies and what is below them.
"""

from treadle_fabric.data.combined import CombinedLoader
from treadle_fabric.data.epochs import Epochs
from treadle_fabric.data.loader import FabricDataLoader, share_loader
from treadle_fabric.data.meeting import BatchMeeting
from treadle_fabric.data.samplers import (
    RecordedSampler,
    copy_loader,
    generators_of,
    has_iterable_dataset,
    record_order,
    set_epoch,
    sized_len,
    suggested_max_num_workers,
)
from treadle_fabric.data.several import several_loaders
from treadle_fabric.data.sharding import ShardedSampler, is_shared, one_of_each, shares_of_ranks
from treadle_fabric.data.streams import PrivateStream, is_stream, keeps_position

__all__ = [
    "BatchMeeting",
    "CombinedLoader",
    "Epochs",
    "FabricDataLoader",
    "PrivateStream",
    "RecordedSampler",
    "ShardedSampler",
    "copy_loader",
    "generators_of",
    "has_iterable_dataset",
    "is_shared",
    "is_stream",
    "keeps_position",
    "one_of_each",
    "record_order",
    "set_epoch",
    "several_loaders",
    "share_loader",
    "shares_of_ranks",
    "sized_len",
    "suggested_max_num_workers",
]
