"""The logger for CSV files, where users of a trainer look for it."""

from treadle_fabric.loggers import CSVLogger

__all__ = ["CSVLogger"]
