"""The loggers of the runtime, where users of a trainer look for them."""

from treadle_fabric.loggers import CSVLogger, DummyLogger, Logger, TensorBoardLogger

__all__ = ["CSVLogger", "DummyLogger", "Logger", "TensorBoardLogger"]
