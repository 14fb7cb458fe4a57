"""The annotations that name the Trainer and the module, and the protocols that internals take.

Users see the real classes in the signatures of hooks, so that a strict type check of their overrides passes. This file
imports them for type checkers only. No other import of the package goes upwards.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treadle.callbacks import Callback as Callback
    from treadle.module import LightningDataModule as LightningDataModule
    from treadle.module import LightningModule as LightningModule
    from treadle.trainer import Trainer as Trainer
