"""The loggers of the runtime, where users of a trainer look for them."""

from typing import TYPE_CHECKING

from treadle_fabric import left_out, on_demand
from treadle_fabric.loggers import (
    CometLogger,
    CSVLogger,
    DummyLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    TrackioLogger,
    WandbLogger,
)

__all__ = [
    "CSVLogger",
    "CometLogger",
    "DummyLogger",
    "Logger",
    "MLFlowLogger",
    "TensorBoardLogger",
    "TrackioLogger",
    "WandbLogger",
]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = left_out(
        __name__,
        {"LitLogger": "the other loggers do the same, and a `Logger` of your own writes to any service."},
        otherwise=on_demand(__name__, {}, submodules=("comet", "csv_logs", "logger", "mlflow", "tensorboard", "wandb")),
    )
