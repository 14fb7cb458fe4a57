"""The logger for W&B, where users of a trainer look for it."""

from treadle_fabric.loggers import WandbLogger

__all__ = ["WandbLogger"]
