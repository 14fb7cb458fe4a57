"""Callbacks: code that runs at the hooks of a run. One file a callback.

Open ``callback.py`` first: it declares every hook. ``model_checkpoint.py`` and ``early_stopping.py`` are the callbacks
that decide by a metric. What several callbacks share has a folder of its own: ``checkpoints/`` (names, paths, links and
the ranking), ``monitoring/`` (the metric, and what is decided alike on every rank), ``progress/`` (the bars),
``summary/`` (the table of layers) and ``averaging/`` (the averages of weights); ``pruning/`` has the parts of
ModelPruning.

Callbacks import the runtime, metrics, module, ``stages.py`` and ``durations.py``, and of the Trainer only the
annotations in ``contracts.py``.
"""

from treadle.callbacks.batch_size_finder import BatchSizeFinder as BatchSizeFinder
from treadle.callbacks.callback import Callback as Callback
from treadle.callbacks.checkpoint import Checkpoint as Checkpoint
from treadle.callbacks.device_stats_monitor import DeviceStatsMonitor as DeviceStatsMonitor
from treadle.callbacks.early_stopping import EarlyStopping as EarlyStopping
from treadle.callbacks.ema_weight_averaging import EMAWeightAveraging as EMAWeightAveraging
from treadle.callbacks.finetuning import BackboneFinetuning as BackboneFinetuning
from treadle.callbacks.finetuning import BaseFinetuning as BaseFinetuning
from treadle.callbacks.gradient_accumulation_scheduler import (
    GradientAccumulationScheduler as GradientAccumulationScheduler,
)
from treadle.callbacks.lambda_function import LambdaCallback as LambdaCallback
from treadle.callbacks.lr_finder import LearningRateFinder as LearningRateFinder
from treadle.callbacks.lr_monitor import LearningRateMonitor as LearningRateMonitor
from treadle.callbacks.model_checkpoint import ModelCheckpoint as ModelCheckpoint
from treadle.callbacks.model_pruning import ModelPruning as ModelPruning
from treadle.callbacks.model_summary import ModelSummary as ModelSummary
from treadle.callbacks.on_exception_checkpoint import OnExceptionCheckpoint as OnExceptionCheckpoint
from treadle.callbacks.optuna_pruning import OptunaPruning as OptunaPruning
from treadle.callbacks.prediction_writer import BasePredictionWriter as BasePredictionWriter
from treadle.callbacks.progress import PlainProgressBar as PlainProgressBar
from treadle.callbacks.progress import ProgressBar as ProgressBar
from treadle.callbacks.progress import RichProgressBar as RichProgressBar
from treadle.callbacks.progress import TQDMProgressBar as TQDMProgressBar
from treadle.callbacks.ray_tune_report import RayTuneReport as RayTuneReport
from treadle.callbacks.rich_model_summary import RichModelSummary as RichModelSummary
from treadle.callbacks.spike import SpikeDetection as SpikeDetection
from treadle.callbacks.stochastic_weight_averaging import StochasticWeightAveraging as StochasticWeightAveraging
from treadle.callbacks.throughput_monitor import ThroughputMonitor as ThroughputMonitor
from treadle.callbacks.timer import Timer as Timer
from treadle.callbacks.weight_averaging import WeightAveraging as WeightAveraging
