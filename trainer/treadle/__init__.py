"""Treadle: the trainer for PyTorch, on its runtime :mod:`treadle_fabric`."""

from treadle.callbacks import Callback
from treadle.combined_loader import CombinedLoader
from treadle.datamodule import LightningDataModule
from treadle.module import LightningModule
from treadle.trainer import Trainer
from treadle_fabric import Fabric, MisconfigurationException, __version__, is_wrapped, seed_everything

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
