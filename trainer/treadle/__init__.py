"""Treadle: the trainer for PyTorch, on its runtime :mod:`treadle_fabric`."""

import gc
from typing import TYPE_CHECKING

_collects = gc.isenabled()
gc.disable()  # one full collection of what torch has made takes as long as all of these imports


from treadle.callbacks import Callback
from treadle.module.datamodule import LightningDataModule
from treadle.module.module import LightningModule
from treadle.trainer.trainer import Trainer
from treadle_fabric import Fabric, MisconfigurationException, __version__, is_wrapped, on_demand, seed_everything
from treadle_fabric.data import CombinedLoader

if _collects:
    if not gc.get_freeze_count():
        gc.freeze()
        gc.unfreeze()  # what was made goes to the oldest generation: it stays, and no collection has to look at it now
    gc.enable()

if TYPE_CHECKING:
    from treadle import accelerators as accelerators
    from treadle import cli as cli
    from treadle import core as core
    from treadle import demos as demos
    from treadle import loggers as loggers
    from treadle import plugins as plugins
    from treadle import strategies as strategies
    from treadle import tuner as tuner
    from treadle import utilities as utilities
    from treadle.demos.logo import cli_lightning_logo as cli_lightning_logo

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

if not TYPE_CHECKING:  # the packages of re-exports, which are attributes as with `import lightning.pytorch as pl`
    __getattr__ = on_demand(
        __name__,
        {"cli_lightning_logo": "treadle.demos.logo"},
        submodules=("accelerators", "cli", "core", "demos", "loggers", "plugins", "strategies", "tuner", "utilities"),
    )
