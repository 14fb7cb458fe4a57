"""The logger for Comet, where users of a trainer look for it."""

from treadle_fabric.loggers import CometLogger

__all__ = ["CometLogger"]
