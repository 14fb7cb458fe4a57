"""The loggers of the runtime, where users of a trainer look for them."""

from typing import TYPE_CHECKING

from treadle_fabric import not_yet
from treadle_fabric.loggers import CSVLogger, DummyLogger, Logger, TensorBoardLogger

__all__ = ["CSVLogger", "DummyLogger", "Logger", "TensorBoardLogger"]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = not_yet(__name__, {"CometLogger", "LitLogger", "MLFlowLogger", "WandbLogger"})
