"""Which rank gets which sample, in which order, from any position.

Start with ``loader.py`` (what ``setup_dataloaders`` returns) and ``sharding.py`` (how samples are shared out).
``samplers.py`` finds the samplers of a loader, ``order.py`` keeps the order of samples independent of the number of
ranks, ``epochs.py`` and ``cursors/`` go on from any position, ``resumable.py`` is the loader whose position is saved,
``several.py`` tells one loader from several, and ``combined.py`` iterates several as one. Imports strategies and what
is below them.
"""

from treadle_fabric.data.combined import CombinedLoader
from treadle_fabric.data.epochs import Epochs
from treadle_fabric.data.loader import FabricDataLoader, share_loader
from treadle_fabric.data.samplers import set_epoch, sized_len
from treadle_fabric.data.several import several_loaders
from treadle_fabric.data.sharding import ShardedSampler, is_shared

__all__ = [
    "CombinedLoader",
    "Epochs",
    "FabricDataLoader",
    "ShardedSampler",
    "is_shared",
    "set_epoch",
    "several_loaders",
    "share_loader",
    "sized_len",
]
