"""The annotations that name the Trainer and the module, and the protocols that internals take."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treadle.module import LightningModule as LightningModule
    from treadle.trainer import Trainer as Trainer
