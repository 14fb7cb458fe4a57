"""The logger for CSV files, where users of Lightning Fabric look for it."""

from treadle_fabric.loggers.csv import CSVLogger

__all__ = ["CSVLogger"]
