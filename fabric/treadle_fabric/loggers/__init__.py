"""Loggers, which write metrics and hyper-parameters: one file for each logger.

Start with ``logger.py``, the base that every logger implements. ``run_folder.py`` is the folder of a file-based logger,
and ``files.py`` reads and writes files, local or remote. ``scalars.py``, ``hyperparameters.py`` and ``media.py`` turn
values into what loggers write, and ``media_files.py`` writes images and the like as files. ``rewinding.py`` (CSV) and
``event_files.py`` (TensorBoard) take files back to what a checkpoint of the run tells. ``conversions.py`` has single
steps for loggers of programs, and nothing here imports it. ``service.py`` is the base of
the loggers of tracking services, and ``saved_checkpoints.py`` says which checkpoints these send. Imports only the
foundation.
"""

from typing import TYPE_CHECKING

from treadle_fabric.checks import on_demand
from treadle_fabric.loggers.csv import CSVLogger
from treadle_fabric.loggers.hyperparameters import to_yaml
from treadle_fabric.loggers.logger import DummyExperiment, DummyLogger, Logger, rank_zero_experiment
from treadle_fabric.loggers.scalars import check_scalars, to_numbers
from treadle_fabric.loggers.tensorboard import TensorBoardLogger

if TYPE_CHECKING:
    from treadle_fabric.loggers.comet import CometLogger
    from treadle_fabric.loggers.mlflow import MLFlowLogger
    from treadle_fabric.loggers.trackio import TrackioLogger
    from treadle_fabric.loggers.wandb import WandbLogger

__all__ = [
    "CSVLogger",
    "CometLogger",
    "DummyExperiment",
    "DummyLogger",
    "Logger",
    "MLFlowLogger",
    "TensorBoardLogger",
    "TrackioLogger",
    "WandbLogger",
    "check_scalars",
    "rank_zero_experiment",
    "to_numbers",
    "to_yaml",
]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = on_demand(  # most programs use none of the services
        __name__,
        {
            "CometLogger": "treadle_fabric.loggers.comet",
            "MLFlowLogger": "treadle_fabric.loggers.mlflow",
            "TrackioLogger": "treadle_fabric.loggers.trackio",
            "WandbLogger": "treadle_fabric.loggers.wandb",
        },
    )
