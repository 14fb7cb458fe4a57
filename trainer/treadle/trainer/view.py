"""What a Trainer shows of itself: read-only properties over its settings and the current run."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from treadle.callbacks import Callback, Checkpoint, EarlyStopping, ProgressBar
from treadle.data.evaluation import EvaluationData
from treadle.data.training import TrainingData
from treadle.loops.fit import FitLoop
from treadle.loops.schedule import total_steps
from treadle.loops.step.backward import manual_backward
from treadle.loops.step.clipping import Clipping
from treadle.metrics.latest import Metrics
from treadle.module import LightningDataModule, LightningModule
from treadle.run.progress import FitProgress, LRSchedulerConfig
from treadle.run.run import Run
from treadle.stages import RunningStage, TrainerState, TrainerStatus
from treadle.trainer.settings import Settings, check_integer
from treadle_fabric import Fabric, FabricOptimizer, MisconfigurationException
from treadle_fabric.accelerators import Accelerator
from treadle_fabric.loggers import Logger
from treadle_fabric.strategies import Strategy

__all__ = ["TrainerView"]


class TrainerView:
    """The properties of :class:`treadle.Trainer`."""

    fabric: Fabric
    """The runtime under this trainer."""
    callbacks: list[Callback]
    state: TrainerState
    should_stop: bool
    """Set it to True to stop after the current batch."""
    fit_progress: FitProgress
    """How far fit has come."""

    _loggers: list[Logger]
    _settings: Settings
    _run: Run | None
    _metrics: Metrics
    _module: LightningModule | None
    _datamodule: LightningDataModule | None
    _fit_loop: FitLoop | None
    _train_data: TrainingData | None
    _eval_data: dict[str, EvaluationData]
    _make_training_data: Callable[[], TrainingData | None] | None
    _ckpt_path: str | None
    _log_dir: str | None
    _sigterm: bool

    # ------------------------------------------------------------------------------------------------ the parts

    @property
    def lightning_module(self) -> LightningModule:
        """The module of the current or last run."""
        if self._module is None:
            raise MisconfigurationException(
                "The trainer has no module yet: it gets one with fit, validate, test or predict."
            )
        return self._module

    @property
    def datamodule(self) -> LightningDataModule | None:
        """The data module of the current or last run."""
        return self._datamodule

    @property
    def model(self) -> torch.nn.Module | None:
        """The module as the strategy wrapped it (under DDP, say); the plain module before that."""
        wrapped = self._run.wrapped if self._run is not None else None
        return wrapped if wrapped is not None else self._module

    @property
    def strategy(self) -> Strategy:
        """How the model is placed on devices and processes."""
        return self.fabric.strategy

    @property
    def accelerator(self) -> Accelerator:
        """The hardware."""
        return self.fabric.accelerator

    @property
    def precision_plugin(self) -> Any:
        """The precision object."""
        return self.fabric.strategy.precision

    @property
    def precision(self) -> str:
        """The precision's name, "32-true" say."""
        return str(self.fabric.strategy.precision.precision)

    @property
    def scaler(self) -> Any:
        """The gradient scaler under 16-mixed; else None."""
        return getattr(self.fabric.strategy.precision, "scaler", None)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The torch optimizers of the current fit."""
        return [o.optimizer for o in self.wrapped_optimizers]

    @property
    def wrapped_optimizers(self) -> list[FabricOptimizer]:
        """The optimizers whose ``step`` goes through precision and strategy."""
        return self._run.optimizers if self._run is not None else []

    @property
    def lr_scheduler_configs(self) -> list[LRSchedulerConfig]:
        """The learning-rate schedulers and when they step."""
        return self._run.schedulers if self._run is not None else []

    @property
    def loggers(self) -> list[Logger]:
        """The loggers; a list that may be changed between runs."""
        return self._loggers

    @property
    def logger(self) -> Logger | None:
        """The first logger, or None."""
        return self.loggers[0] if self.loggers else None

    # ------------------------------------------------------------------------------------------------ processes

    @property
    def global_rank(self) -> int:
        """This process's rank among all."""
        return self.fabric.global_rank

    @property
    def local_rank(self) -> int:
        """This process's rank on its node."""
        return self.fabric.local_rank

    @property
    def node_rank(self) -> int:
        """This node's rank."""
        return self.fabric.node_rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.fabric.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.fabric.is_global_zero

    @property
    def num_devices(self) -> int:
        """The devices on this node."""
        return max(1, self.world_size // self.num_nodes)

    @property
    def num_nodes(self) -> int:
        """The nodes."""
        return int(getattr(self.strategy, "num_nodes", 1))

    @property
    def device_ids(self) -> list[int]:
        """The indices of the devices on this node."""
        devices = getattr(self.strategy, "parallel_devices", None) or [self.strategy.root_device]
        return [i if d.index is None else d.index for i, d in enumerate(devices)]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """Number of replicas and rank for samplers; None on one process."""
        return self.strategy.distributed_sampler_kwargs

    # ------------------------------------------------------------------------------------------------ paths

    @property
    def default_root_dir(self) -> str:
        """Where logs and checkpoints go unless a logger or callback says otherwise. Default: the working directory."""
        return self._settings.default_root_dir

    @property
    def log_dir(self) -> str | None:
        """The first logger's folder, the same on every rank; ``default_root_dir`` without loggers."""
        if self._log_dir is not None:
            return self._log_dir
        return (self.loggers[0].log_dir or self.default_root_dir) if self.loggers else self.default_root_dir

    @property
    def ckpt_path(self) -> str | None:
        """The checkpoint that the current or last run was started from."""
        return self._ckpt_path

    # ------------------------------------------------------------------------------------------------ callbacks

    @property
    def early_stopping_callbacks(self) -> list[EarlyStopping]:
        """Every EarlyStopping."""
        return [c for c in self.callbacks if isinstance(c, EarlyStopping)]

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        """The first EarlyStopping, or None."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def checkpoint_callbacks(self) -> list[Checkpoint]:
        """Every checkpoint callback."""
        return [c for c in self.callbacks if isinstance(c, Checkpoint)]

    @property
    def checkpoint_callback(self) -> Checkpoint | None:
        """The first checkpoint callback, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def progress_bar_callback(self) -> ProgressBar | None:
        """The progress bar, or None."""
        return next((c for c in self.callbacks if isinstance(c, ProgressBar)), None)

    # ------------------------------------------------------------------------------------------------ state

    @property
    def training(self) -> bool:
        """Whether a training loop is running, between its evaluations."""
        return self.state.stage is RunningStage.TRAINING

    @property
    def validating(self) -> bool:
        """Whether validation runs, in fit or by itself."""
        return self.state.stage is RunningStage.VALIDATING

    @property
    def testing(self) -> bool:
        """Whether testing runs."""
        return self.state.stage is RunningStage.TESTING

    @property
    def predicting(self) -> bool:
        """Whether prediction runs."""
        return self.state.stage is RunningStage.PREDICTING

    @property
    def sanity_checking(self) -> bool:
        """Whether the sanity check runs."""
        return self.state.stage is RunningStage.SANITY_CHECKING

    @property
    def evaluating(self) -> bool:
        """Whether validation or testing runs."""
        return self.validating or self.testing

    @property
    def interrupted(self) -> bool:
        """Whether the last run ended with KeyboardInterrupt."""
        return self.state.status is TrainerStatus.INTERRUPTED

    @property
    def received_sigterm(self) -> bool:
        """Whether the process was asked to terminate."""
        return self._sigterm

    @property
    def is_last_batch(self) -> bool:
        """Whether the current training batch is the epoch's last."""
        return self.fit_progress.is_last_batch

    @property
    def validation_due(self) -> bool:
        """Whether validation follows right after the current batch's ``on_train_batch_end``."""
        return self.fit_progress.validation_due

    @property
    def global_step(self) -> int:
        """The batches so far at which an optimizer stepped, whatever the number of optimizers."""
        return self.fit_progress.step

    @property
    def current_epoch(self) -> int:
        """The completed epochs; inside an epoch, its number from 0."""
        return self.fit_progress.epoch

    # ------------------------------------------------------------------------------------------------ settings

    @property
    def fast_dev_run(self) -> int:
        """The batches of a trial run; 0 where it is none."""
        return self._settings.fast_dev_run

    @property
    def on_save_error(self) -> str:
        """What happens where a checkpoint cannot be written: "raise" or "warn"."""
        return self._settings.on_save_error

    @property
    def max_epochs(self) -> int | None:
        """The largest number of epochs; -1 where there is no bound."""
        return self._settings.durations.max_epochs

    @property
    def min_epochs(self) -> int | None:
        """The smallest number of epochs."""
        return self._settings.durations.min_epochs

    @property
    def max_steps(self) -> int:
        """The largest number of steps; -1 where there is no bound."""
        return self._settings.durations.max_steps

    @property
    def min_steps(self) -> int | None:
        """The smallest number of steps."""
        return self._settings.durations.min_steps

    @property
    def log_every_n_steps(self) -> int:
        """How often step values go to the loggers."""
        return self._settings.log_every_n_steps

    @property
    def limit_train_batches(self) -> int | float:
        """The limit on training batches."""
        return self._settings.limits["train"]

    @property
    def limit_val_batches(self) -> int | float:
        """The limit on validation batches."""
        return self._settings.limits["val"]

    @property
    def limit_test_batches(self) -> int | float:
        """The limit on test batches."""
        return self._settings.limits["test"]

    @property
    def limit_predict_batches(self) -> int | float:
        """The limit on batches to predict."""
        return self._settings.limits["predict"]

    @property
    def overfit_batches(self) -> int | float:
        """The batches to overfit on; 0.0 where that is not asked."""
        return self._settings.overfit_batches

    @property
    def val_check_interval(self) -> Any:
        """As given: batches, a fraction of an epoch, or a duration."""
        return self._settings.val_check_interval

    @property
    def val_check_batch(self) -> float:
        """The batches between two validations; infinity where it goes by epochs or time."""
        epoch = self._fit_loop.epoch if self._fit_loop is not None else None
        return epoch.val_check_batch if epoch is not None else math.inf

    @property
    def check_val_every_n_epoch(self) -> int | None:
        """The epochs between two validations."""
        return self._settings.check_val_every_n_epoch

    @property
    def num_sanity_val_steps(self) -> int:
        """The batches of the sanity check; -1 for all."""
        return self._settings.num_sanity_val_steps

    @property
    def gradient_clip_val(self) -> float | None:
        """The largest gradient norm or value."""
        return self._settings.gradient_clip_val

    @property
    def gradient_clip_algorithm(self) -> str | None:
        """What is limited: "norm" or "value"."""
        return self._settings.gradient_clip_algorithm

    @property
    def accumulate_grad_batches(self) -> int:
        """The batches of one optimizer step; a callback may set it between epochs."""
        return self._settings.accumulate_grad_batches

    @accumulate_grad_batches.setter
    def accumulate_grad_batches(self, batches: int) -> None:
        self._settings.accumulate_grad_batches = check_integer(batches, "accumulate_grad_batches", 1)

    # ------------------------------------------------------------------------------------------------ loaders

    @property
    def train_dataloader(self) -> Any:
        """The training loader of the current or last fit, as this rank iterates it."""
        return self._train_data.loader if self._train_data is not None else None

    def _loaders(self, stage: str) -> Any:
        data = self._eval_data.get(stage)
        if data is None:
            return None
        return data.loaders[0] if len(data.loaders) == 1 else data.loaders

    @property
    def val_dataloaders(self) -> Any:
        """The validation loader, or the list of them."""
        return self._loaders("val")

    @property
    def test_dataloaders(self) -> Any:
        """The test loader, or the list of them."""
        return self._loaders("test")

    @property
    def predict_dataloaders(self) -> Any:
        """The prediction loader, or the list of them."""
        return self._loaders("predict")

    @property
    def num_training_batches(self) -> float:
        """The training batches of an epoch on this rank; infinity where that is not known."""
        return self._train_data.num_batches if self._train_data is not None else math.inf

    @property
    def num_val_batches(self) -> list[float]:
        """The validation batches of each loader."""
        return self._eval_data["val"].num_batches if "val" in self._eval_data else []

    @property
    def num_sanity_val_batches(self) -> list[float]:
        """The sanity-check batches of each loader."""
        steps = self.num_sanity_val_steps
        return [n if steps == -1 else min(n, steps) for n in self.num_val_batches]

    @property
    def num_test_batches(self) -> list[float]:
        """The test batches of each loader."""
        return self._eval_data["test"].num_batches if "test" in self._eval_data else []

    @property
    def num_predict_batches(self) -> list[float]:
        """The batches to predict of each loader."""
        return self._eval_data["predict"].num_batches if "predict" in self._eval_data else []

    @property
    def enable_validation(self) -> bool:
        """Whether fit validates: there is a ``validation_step``, a loader, and the limit is not 0."""
        return self._fit_loop is not None and self._fit_loop.validation is not None

    @property
    def estimated_stepping_batches(self) -> float:
        """The optimizer steps of the whole fit, for schedulers made in ``configure_optimizers``; infinity if unbounded.

        Asks for the training loader if that was not done yet.
        """
        if self._make_training_data is None:
            raise MisconfigurationException("estimated_stepping_batches is known in fit only.")
        if self._train_data is None:
            self._train_data = self._make_training_data()
        batches = self._train_data.num_batches if self._train_data is not None else 0
        return total_steps(self._settings.durations, batches, self.accumulate_grad_batches)

    # ------------------------------------------------------------------------------------------------ metrics

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The newest value of everything logged, as scalar tensors."""
        return self._metrics.callback

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The newest value of what goes to the loggers."""
        return self._metrics.logged

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """What the progress bar shows; reading it brings the values to the host."""
        return self._metrics.bar

    def metrics_on_cpu(self) -> Metrics:
        """A copy of what was logged that can be sent to another process."""
        return self._metrics.detached()

    def take_outcome(
        self, module: LightningModule, state: TrainerState, progress: FitProgress, metrics: Metrics, should_stop: bool
    ) -> None:
        """Take over how a run went that another process did."""
        self._module, self.state, self.fit_progress, self._metrics = module, state, progress, metrics
        self.should_stop = should_stop

    # ------------------------------------------------------------------------------------------------ for modules

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Make a module on the device and in the precision of this trainer, in a with block."""
        return self.fabric.init_module(empty_init=empty_init)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0 only, above the progress bar."""
        bar = self.progress_bar_callback
        if self.is_global_zero:
            (print if bar is None else bar.print)(*args, **kwargs)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward in manual optimization, with its hooks; modules call it as ``self.manual_backward``."""
        assert self._run is not None
        manual_backward(self._run, loss, *args, **kwargs)

    def clip_gradients(self, optimizer: Optimizer, value: float | None = None, algorithm: str | None = None) -> None:
        """Clip gradients; modules call it as ``self.clip_gradients``."""
        run, settings = self._run, self._settings
        assert run is not None
        Clipping(run, settings.gradient_clip_val, settings.gradient_clip_algorithm).clip(optimizer, value, algorithm)
