"""The logger for TensorBoard, where users of a trainer look for it."""

from treadle_fabric.loggers import TensorBoardLogger

__all__ = ["TensorBoardLogger"]
