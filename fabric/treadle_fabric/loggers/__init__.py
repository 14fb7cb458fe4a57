"""Loggers, which write metrics and hyper-parameters: one file for each logger.

Start with ``logger.py``, the base that every logger implements. ``run_folder.py`` is the folder of a file-based logger,
``scalars.py`` and ``hyperparameters.py`` turn values into what loggers write. ``rewinding.py`` (CSV) and
``event_files.py`` (TensorBoard) take files back to a checkpoint of the run that goes on. Imports only the foundation.
"""

from treadle_fabric.loggers.csv import CSVLogger
from treadle_fabric.loggers.logger import DummyLogger, Logger, rank_zero_experiment
from treadle_fabric.loggers.scalars import to_numbers
from treadle_fabric.loggers.tensorboard import TensorBoardLogger

__all__ = ["CSVLogger", "DummyLogger", "Logger", "TensorBoardLogger", "rank_zero_experiment", "to_numbers"]
