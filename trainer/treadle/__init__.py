"""Treadle: the trainer for PyTorch, on its runtime :mod:`treadle_fabric`."""

import gc

_collects = gc.isenabled()
gc.disable()  # one full collection of what torch has made takes as long as all of these imports


from treadle.callbacks import Callback
from treadle.module.datamodule import LightningDataModule
from treadle.module.module import LightningModule
from treadle.trainer.trainer import Trainer
from treadle_fabric import Fabric, MisconfigurationException, __version__, is_wrapped, seed_everything
from treadle_fabric.data import CombinedLoader

if _collects:
    gc.enable()

__all__ = [
    "Callback",
    "CombinedLoader",
    "Fabric",
    "LightningDataModule",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "__version__",
    "is_wrapped",
    "seed_everything",
]
