"""What users subclass, where users of a trainer look for it.

Every name is a re-export: of ``treadle.module``, and of what is below.
"""

from typing import TYPE_CHECKING

from treadle.module import LightningDataModule, LightningModule
from treadle_fabric import on_demand

__all__ = ["LightningDataModule", "LightningModule"]

if not TYPE_CHECKING:
    __getattr__ = on_demand(__name__, {}, submodules=("datamodule", "hooks", "mixins", "module", "optimizer", "saving"))
