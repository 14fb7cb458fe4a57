"""Callbacks: code that runs at the hooks of a run. One file a callback.

Open ``callback.py`` first: it declares every hook. ``model_checkpoint.py`` and ``early_stopping.py`` are the callbacks
that decide by a metric. What several callbacks share has a folder of its own: ``checkpoints/`` (names, paths, links and
the ranking), ``monitoring/`` (the metric, and what is decided alike on every rank), ``progress/`` (the bars),
``summary/`` (the table of layers), ``averaging/`` (the averages of weights) and ``reporting/`` (the reports to Ray);
``pruning/`` has the parts of ModelPruning.

Callbacks import the runtime, metrics, module, ``stages.py`` and ``durations.py``, and of the Trainer only the
annotations in ``contracts.py``.
"""

from typing import TYPE_CHECKING

from treadle.callbacks.callback import Callback
from treadle.callbacks.checkpoint import Checkpoint
from treadle.callbacks.early_stopping import EarlyStopping
from treadle.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from treadle.callbacks.lambda_function import LambdaCallback
from treadle.callbacks.lr_monitor import LearningRateMonitor
from treadle.callbacks.model_checkpoint import ModelCheckpoint
from treadle.callbacks.model_summary import ModelSummary
from treadle.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from treadle.callbacks.prediction_writer import BasePredictionWriter
from treadle.callbacks.progress import PlainProgressBar, ProgressBar, RichProgressBar, TQDMProgressBar
from treadle.callbacks.rich_model_summary import RichModelSummary
from treadle.callbacks.timer import Timer
from treadle_fabric import on_demand

if TYPE_CHECKING:
    from treadle.callbacks.batch_size_finder import BatchSizeFinder
    from treadle.callbacks.device_stats_monitor import DeviceStatsMonitor
    from treadle.callbacks.ema_weight_averaging import EMAWeightAveraging
    from treadle.callbacks.finetuning import BackboneFinetuning, BaseFinetuning
    from treadle.callbacks.lr_finder import LearningRateFinder
    from treadle.callbacks.model_pruning import ModelPruning
    from treadle.callbacks.optuna_pruning import OptunaPruning
    from treadle.callbacks.ray_train_report import RayTrainReportCallback
    from treadle.callbacks.ray_tune_report import RayTuneReport
    from treadle.callbacks.spike import SpikeDetection
    from treadle.callbacks.stochastic_weight_averaging import StochasticWeightAveraging
    from treadle.callbacks.throughput_monitor import ThroughputMonitor
    from treadle.callbacks.weight_averaging import WeightAveraging

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "Checkpoint",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelPruning",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "OptunaPruning",
    "PlainProgressBar",
    "ProgressBar",
    "RayTrainReportCallback",
    "RayTuneReport",
    "RichModelSummary",
    "RichProgressBar",
    "SpikeDetection",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "WeightAveraging",
]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = on_demand(  # few programs use them, and each import takes time
        __name__,
        {
            "BackboneFinetuning": "treadle.callbacks.finetuning",
            "BaseFinetuning": "treadle.callbacks.finetuning",
            "BatchSizeFinder": "treadle.callbacks.batch_size_finder",
            "DeviceStatsMonitor": "treadle.callbacks.device_stats_monitor",
            "EMAWeightAveraging": "treadle.callbacks.ema_weight_averaging",
            "LearningRateFinder": "treadle.callbacks.lr_finder",
            "ModelPruning": "treadle.callbacks.model_pruning",
            "OptunaPruning": "treadle.callbacks.optuna_pruning",
            "RayTrainReportCallback": "treadle.callbacks.ray_train_report",
            "RayTuneReport": "treadle.callbacks.ray_tune_report",
            "SpikeDetection": "treadle.callbacks.spike",
            "StochasticWeightAveraging": "treadle.callbacks.stochastic_weight_averaging",
            "ThroughputMonitor": "treadle.callbacks.throughput_monitor",
            "WeightAveraging": "treadle.callbacks.weight_averaging",
        },
    )
