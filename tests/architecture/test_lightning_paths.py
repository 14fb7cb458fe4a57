"""Module paths that Lightning's users type keep importing, wherever the code has moved to."""

from __future__ import annotations

import importlib

import pytest

from treadle.callbacks.summary.layers import ModelSummary
from treadle.utilities import model_summary

TRAINER = """callbacks callbacks.callback callbacks.checkpoint callbacks.early_stopping
    callbacks.gradient_accumulation_scheduler callbacks.lambda_function callbacks.lr_monitor callbacks.model_checkpoint
    callbacks.model_summary callbacks.on_exception_checkpoint callbacks.progress callbacks.progress.progress_bar
    callbacks.progress.rich_progress callbacks.progress.tqdm_progress callbacks.rich_model_summary callbacks.timer cli
    callbacks.device_stats_monitor callbacks.finetuning callbacks.prediction_writer callbacks.spike
    callbacks.throughput_monitor loggers loggers.comet loggers.csv_logs loggers.logger loggers.mlflow
    loggers.tensorboard loggers.wandb loops plugins.layer_sync trainer utilities utilities.types""".split()
FABRIC = """accelerators accelerators.accelerator accelerators.cpu accelerators.cuda accelerators.mps
    accelerators.registry fabric loggers loggers.logger loggers.tensorboard strategies strategies.ddp
    strategies.parallel strategies.registry strategies.single_device strategies.strategy utilities utilities.seed
    utilities.throughput wrappers""".split()


@pytest.mark.parametrize(
    "path", [*(f"treadle.{name}" for name in TRAINER), *(f"treadle_fabric.{name}" for name in FABRIC)]
)
def test_the_path_imports(path: str) -> None:
    importlib.import_module(path)  # passes if nothing is raised


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("treadle.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("treadle.callbacks.progress.tqdm_progress", "TQDMProgressBar"),
        ("treadle.callbacks.model_summary", "ModelSummary"),
        ("treadle.trainer", "Trainer"),
        ("treadle.loggers.csv_logs", "CSVLogger"),
        ("treadle.loggers.logger", "Logger"),
        ("treadle.loggers.logger", "rank_zero_experiment"),
        ("treadle.loggers.tensorboard", "TensorBoardLogger"),
        ("treadle_fabric.fabric", "Fabric"),
        ("treadle_fabric.strategies.ddp", "DDPStrategy"),
        ("treadle_fabric.wrappers", "FabricModule"),
        ("treadle_fabric.wrappers", "FabricOptimizer"),
        ("treadle_fabric.wrappers", "FabricDataLoader"),
    ],
)
def test_the_class_is_found_there(path: str, name: str) -> None:
    package = importlib.import_module(path.split(".")[0])
    found = getattr(importlib.import_module(path), name)
    assert getattr(package, name, found) is found


def test_a_summary_and_the_callback_that_prints_it_have_the_same_name() -> None:
    assert model_summary.ModelSummary is ModelSummary
