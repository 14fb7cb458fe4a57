"""The module, where users of a trainer look for it."""

from treadle.module.module import LightningModule

__all__ = ["LightningModule"]
