"""Treadle: the trainer for PyTorch, on its runtime :mod:`treadle_fabric`."""

from treadle.callbacks import Callback
from treadle.module.datamodule import LightningDataModule
from treadle.module.module import LightningModule
from treadle.trainer.trainer import Trainer
from treadle_fabric import Fabric, MisconfigurationException, __version__, is_wrapped, seed_everything
from treadle_fabric.data import CombinedLoader

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
