"""Where metrics and hyper-parameters are written."""

from treadle_fabric.loggers.csv import CSVLogger
from treadle_fabric.loggers.logger import DummyLogger, Logger, rank_zero_experiment
from treadle_fabric.loggers.tensorboard import TensorBoardLogger

__all__ = ["CSVLogger", "DummyLogger", "Logger", "TensorBoardLogger", "rank_zero_experiment"]
