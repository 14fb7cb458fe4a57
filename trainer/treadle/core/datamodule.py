"""The data module, where users of a trainer look for it."""

from treadle.module.datamodule import LightningDataModule

__all__ = ["LightningDataModule"]
