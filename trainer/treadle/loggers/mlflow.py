"""The logger for MLflow, where users of a trainer look for it."""

from treadle_fabric.loggers import MLFlowLogger

__all__ = ["MLFlowLogger"]
