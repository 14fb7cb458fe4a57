"""The Trainer: runs everything around ``training_step``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from treadle.callbacks import Callback, Checkpoint, EarlyStopping, ProgressBar
from treadle.loops.schedule import change_durations
from treadle.loops.step.backward import manual_backward
from treadle.loops.step.clipping import Clipping
from treadle.metrics.latest import Metrics
from treadle.module import LightningDataModule, LightningModule, LRSchedulerConfig
from treadle.profilers import PassThroughProfiler, Profiler
from treadle.profilers.choose import choose_profiler
from treadle.run.layer_sync import LayerSync
from treadle.run.progress import FitProgress
from treadle.run.run import ReadyRun, Run
from treadle.stages import RunningStage, TrainerFn, TrainerState, TrainerStatus
from treadle.trainer import preflight
from treadle.trainer.runner import Runner, Source
from treadle.trainer.settings import (
    Setting,
    Settings,
    StageFlag,
    checked_loggers,
    choose_callbacks,
    choose_loggers,
    reads_environment,
    resolve_settings,
)
from treadle.trainer.trials import Trials, trial_settings
from treadle.trainer.view import ConnectorView, EvaluationLoopView, FitLoopView
from treadle_fabric import (
    Fabric,
    FabricOptimizer,
    MisconfigurationException,
    NoModuleError,
    PathLike,
    check_integer,
    one_or_several,
    suggests_arguments,
)
from treadle_fabric.accelerators import Accelerator
from treadle_fabric.loggers import Logger
from treadle_fabric.strategies import Plugin, Strategy

__all__ = ["Trainer"]

T = TypeVar("T")


class Trainer:
    """Trains, validates, tests and predicts with a :class:`treadle.LightningModule`.

    Args:
        accelerator: "cpu", "cuda", "mps", "gpu" or "auto" (the best there is).
        strategy: "auto", "ddp", "ddp_spawn", ... or a strategy object.
        devices: a number, a list of indices, "0,1", -1 or "auto" (all).
        num_nodes: the number of nodes. Default: 1.
        precision: "32-true" (default), "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", and short names.
        logger: True (default: TensorBoard, or CSV where that is not installed), False, a logger or a list.
        callbacks: a callback or a list.
        fast_dev_run: run n (True: 1) batches of everything, without checkpoints, with a logger that writes nothing.
        max_epochs: default: 1000 where nothing else bounds the run; -1 for no bound.
        min_epochs: do not stop before this number of epochs.
        max_steps: the largest number of optimizer steps. Default: -1, no bound.
        min_steps: do not stop before this number of optimizer steps.
        max_time: "DD:HH:MM:SS", a timedelta or a dict of its arguments.
        limit_train_batches: a number of batches (int) or a fraction (float). Default: 1.0.
        limit_val_batches: the same for validation.
        limit_test_batches: the same for testing.
        limit_predict_batches: the same for prediction.
        overfit_batches: train and validate on this many batches (or this fraction), without shuffling.
        val_check_interval: batches (int), a fraction of an epoch (float) or a duration. Default: 1.0.
        check_val_every_n_epoch: epochs between validations. Default: 1; None counts batches across epochs.
        num_sanity_val_steps: validation batches to try before training. Default: 2; -1 for all.
        log_every_n_steps: steps between two writes of step values to the loggers. Default: 50.
        enable_checkpointing: whether there is a ModelCheckpoint by default. Default: True.
        enable_progress_bar: whether there is a progress bar. Default: True.
        enable_model_summary: whether fit prints a summary of the model first. Default: True.
        accumulate_grad_batches: batches of one optimizer step. Default: 1.
        gradient_clip_val: the largest gradient norm or value; None clips nothing.
        gradient_clip_algorithm: "norm" (default) or "value".
        deterministic: True refuses non-deterministic operations, "warn" warns of them.
        benchmark: ``torch.backends.cudnn.benchmark`` during the run.
        inference_mode: validate, test and predict under ``torch.inference_mode``. Default: True. False, and inside fit:
            under ``torch.no_grad``.
        use_distributed_sampler: share the samples of loaders out over the ranks. Default: True.
        profiler: "simple", "advanced", "pytorch" or a :class:`treadle.profilers.Profiler`. Default: none.
        detect_anomaly: find the operation that made a NaN gradient. Default: False.
        barebones: turn off everything that costs time: bar, loggers, checkpoints, summary, sanity check, callbacks.
        plugins: precision, cluster environment, checkpoint IO and LayerSync objects.
        sync_batchnorm: share batch-norm statistics over the ranks.
        reload_dataloaders_every_n_epochs: ask for fit's loaders anew every n epochs. Default: 0, never.
        default_root_dir: where logs and checkpoints go. Default: the working directory.
        enable_autolog_hparams: log hyper-parameters when fit starts.
        model_registry: not used; accepted for scripts that pass it.
        auto_resume: fit without ``ckpt_path`` goes on from the newest checkpoint that is whole, if there is one.
        on_save_error: "warn": training goes on where a checkpoint could not be written. Default: "raise".
        on_nonfinite: what a loss or gradient that is NaN or infinite does: "raise" NonFiniteError, "skip" the step, or
            "warn". Costs one wait for the device a step, and copies of batch and buffers. Default: no check.

    Raises:
        MisconfigurationException: an argument is wrong; nothing has been started then.
    """

    @reads_environment
    @partial(suggests_arguments, instead=preflight.instead_of)
    def __init__(
        self,
        *,
        accelerator: Accelerator | str = "auto",
        strategy: Strategy | str = "auto",
        devices: int | str | Iterable[int] = "auto",
        num_nodes: int = 1,
        precision: int | str | None = None,
        logger: Logger | Iterable[Logger] | bool | None = None,
        callbacks: Iterable[Callback] | Callback | None = None,
        fast_dev_run: int | bool = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: str | timedelta | dict[str, int] | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: bool | str | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        profiler: Profiler | str | None = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        plugins: Plugin | LayerSync | Iterable[Plugin | LayerSync] | None = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: PathLike | None = None,
        enable_autolog_hparams: bool = True,
        model_registry: str | None = None,
        auto_resume: bool = False,
        on_save_error: Literal["raise", "warn"] = "raise",
        on_nonfinite: Literal["raise", "skip", "warn"] | None = None,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self._settings = settings = resolve_settings(given)
        self.profiler = choose_profiler(profiler)
        """Measures the actions of a run: ``with trainer.profiler.profile("name"): ...``."""
        self.callbacks = choose_callbacks(callbacks, settings)
        self._loggers = choose_loggers(given["logger"], settings)
        self.fabric = Fabric(
            accelerator=accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            plugins=given["plugins"],
            loggers=self._loggers,
        )
        preflight.tell_of_devices(self.fabric.accelerator)
        self._configure_steps()
        self.should_stop = False
        """Set it to True to stop after the current batch."""
        self._runner = Runner(self, settings)

    # ------------------------------------------------------------------------------------------------ entry points

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: PathLike | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train from the beginning, or go on from the checkpoint ``ckpt_path``.

        Ctrl-C ends the fit in good order and raises ``SystemExit(1)``; in a notebook the call returns, and
        :attr:`interrupted` is True.

        Args:
            model: the module, or ``torch.compile(module)``: its steps run compiled, and its hooks as they are.
            train_dataloaders: an iterable of batches, several of them, or a data module.
            val_dataloaders: an iterable of batches, or a list of them.
            datamodule: gives the loaders instead.
            ckpt_path: resume from this checkpoint: a path, "last", "best" or "hpc". "last" and "hpc" go on in the
                loggers' run; others begin a new version, which names the run that it branches from.
            weights_only: False unpickles arbitrary objects from it; only for files you trust. Default: True.

        Raises:
            MisconfigurationException: module, loaders and settings do not fit together; nothing has been started then.
            CheckpointError: the checkpoint is missing, damaged or does not fit.
        """
        train_dataloaders, datamodule = preflight.split_datamodule(train_dataloaders, datamodule)
        preflight.check_alone(datamodule, val_dataloaders=val_dataloaders)
        model = preflight.check_model(model, "fit")
        preflight.check_loaders(train_dataloaders=train_dataloaders, val_dataloaders=val_dataloaders)
        preflight.check_fit(model, self._settings, train_dataloaders, val_dataloaders, datamodule, self.strategy)
        resumes = ckpt_path is not None or self._settings.auto_resume
        self._runner.begin_fit(model, resumes=resumes)
        self.should_stop = False
        self._runner.launch(
            self._runner.fit, model, datamodule, train_dataloaders, val_dataloaders, (ckpt_path, weights_only)
        )

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: PathLike | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Evaluate on the validation set.

        Args:
            model: the module; default: the one of the last run. Without ``ckpt_path`` it gets the weights of the best
                checkpoint then, where a ModelCheckpoint has saved one, and a warning says so.
            dataloaders: an iterable of batches, a list of them, or a data module.
            ckpt_path: load these weights first: a path, "best" or "last".
            verbose: print the results.
            datamodule: gives the loaders instead.
            weights_only: False unpickles arbitrary objects from the checkpoint. Default: True.

        Returns:
            For every loader the logged names and values.
        """
        return self._evaluate(TrainerFn.VALIDATING, model, dataloaders, (ckpt_path, weights_only), verbose, datamodule)

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: PathLike | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Evaluate on the test set; arguments and result as for :meth:`validate`."""
        return self._evaluate(TrainerFn.TESTING, model, dataloaders, (ckpt_path, weights_only), verbose, datamodule)

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | Literal["stream"] | None = None,
        ckpt_path: PathLike | None = None,
        weights_only: bool | None = None,
    ) -> list[Any] | Iterator[Any] | None:
        """Run ``predict_step`` over the loaders.

        Args:
            model: the module; default: the one of the last run, as for :meth:`validate`.
            dataloaders: an iterable of batches, a list of them, or a data module.
            datamodule: gives the loaders instead.
            return_predictions: keep what the steps return. Default: True. "stream": return an iterator that predicts
                one batch at a time, so that no more than one batch of each rank is in memory. The trainer runs nothing
                else until the iterator ends or is closed, and every rank has to read the iterator to its end.
            ckpt_path: load these weights first: a path, "best" or "last".
            weights_only: False unpickles arbitrary objects from the checkpoint. Default: True.

        Returns:
            What ``predict_step`` returned for each batch, on the CPU, in the order of the loader; a list of such lists
            with several loaders; None where predictions are not kept. Ranks take turns with the batches, and each rank
            gets the predictions of all. Of a loader that shares itself out (a stream, for example), and of a
            ``CombinedLoader`` that runs side by side, a rank gets its own part.
        """
        dataloaders, datamodule = preflight.split_datamodule(dataloaders, datamodule)
        module = preflight.model_or_last(model, self._runner.module, "predict")
        source = self._source(model, ckpt_path, weights_only, TrainerFn.PREDICTING)
        preflight.check_loaders(dataloaders=dataloaders)
        preflight.check_predict(module, dataloaders, datamodule, self.strategy)
        preflight.check_return_predictions(return_predictions, self.strategy)
        if return_predictions == "stream":
            self.fabric.launch()
            stream = self._runner.stream(module, datamodule, dataloaders, source)
            next(stream, None)  # errors are raised here, not at the first batch
            return stream
        keep = return_predictions is not False
        found = self._runner.launch(self._runner.predict, module, datamodule, dataloaders, source, keep)
        return cast("list[Any] | None", found)

    def save_checkpoint(
        self, filepath: PathLike, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; every rank calls it.

        Args:
            filepath: a local path or an fsspec URL.
            weights_only: leave out optimizers, schedulers and callbacks. Default: False.
            storage_options: passed to the checkpoint IO.

        Raises:
            NoModuleError: there is no module that was set up.
            CheckpointError: the file cannot be written.
        """
        if not isinstance(self._run, ReadyRun):
            raise NoModuleError(
                "save_checkpoint needs a module that was set up: call it in or after fit, validate, test or predict."
            )
        self._runner.save(filepath, weights_only=bool(weights_only), storage_options=storage_options)

    # ------------------------------------------------------------------------------------------------ searches

    def search(
        self,
        function: Callable[[Trials], T],
        fn: TrainerFn | None = None,
        model: Any = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
    ) -> T:
        """Run a search by trials: batches after which module, optimizers, loaders and this trainer are as before.

        Callbacks and loggers take no part in trials. Inside a run (``fn`` is None), trials are of that run.

        Args:
            function: the search; it runs in every process, and gets what runs its trials.
            fn: the stage whose batches are tried.
            model: as for the method of that stage, as the other arguments are.
            dataloaders: loaders of that stage.
            datamodule: gives the loaders instead.

        Returns:
            What the search returned.
        """
        if fn is None:
            return self._runner.search_within(function)
        dataloaders, datamodule = preflight.split_datamodule(dataloaders, datamodule)
        module = preflight.check_model(model, fn.value)
        preflight.check_idle(self.state, fn)
        preflight.check_loaders(dataloaders=dataloaders)
        preflight.check_stage(module, fn, self._settings, dataloaders, datamodule, self.strategy)
        return self.for_trials(trial_settings(self._settings), []).launch_search(
            function, module, datamodule, fn, dataloaders
        )

    def renew(self, *, loaders: bool = False) -> bool:
        """Make anew what depends on an attribute that a callback has changed: before the first batch, the optimizers.

        Args:
            loaders: whether the loaders of the running stage depend on it, too. Default: False.

        Returns:
            Whether the optimizers were made anew.
        """
        return self._runner.renew(loaders=loaders)

    def for_trials(self, settings: Settings, callbacks: list[Callback]) -> Runner:
        """Return the runner of a copy of this trainer that shares the runtime, and has no loggers."""
        trial = copy.copy(self)
        trial._settings, trial.callbacks, trial._loggers, trial.should_stop = settings, callbacks, [], False
        trial.profiler = PassThroughProfiler()
        trial._runner = Runner(trial, settings)
        return trial._runner

    # ------------------------------------------------------------------------------------------------ the parts

    @property
    def lightning_module(self) -> LightningModule:
        """The module of the current or last run; None before the first."""
        return cast("LightningModule", self._runner.module)  # for type checkers, as hooks and programs read it

    @property
    def datamodule(self) -> LightningDataModule | None:
        """The data module of the current or last run."""
        return self._runner.session.datamodule if self._runner.session is not None else None

    @property
    def model(self) -> torch.nn.Module | None:
        """What runs the module: under DDP, for example, DDP's object; the module itself where nothing wraps it."""
        run = self._run
        return run.engine if isinstance(run, ReadyRun) else self._runner.module

    @property
    def strategy(self) -> Strategy:
        """The strategy: how the model is placed on devices and processes."""
        return self.fabric.strategy

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator: the hardware of this run."""
        return self.fabric.accelerator

    @property
    def precision_plugin(self) -> Any:
        """The precision object."""
        return self.fabric.strategy.precision

    @property
    def precision(self) -> str:
        """The precision's name, such as "32-true"."""
        return str(self.fabric.strategy.precision.precision)

    @property
    def scaler(self) -> Any:
        """The gradient scaler with 16-mixed; else None."""
        return getattr(self.fabric.strategy.precision, "scaler", None)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The torch optimizers of the current fit, or of the last one while its module is evaluated.

        Others may be set in a fit: they step from the next epoch on, or from the first one in hooks before it. The
        schedulers stay those of the former optimizers.
        """
        return [o.optimizer for o in self.wrapped_optimizers]

    @optimizers.setter
    def optimizers(self, optimizers: Any) -> None:
        self._runner.replace_optimizers(one_or_several(optimizers))

    @property
    def wrapped_optimizers(self) -> list[FabricOptimizer]:
        """The optimizers whose ``step`` goes through precision and strategy."""
        return run.optimizers if (run := self._runner.trained) is not None else []

    @property
    def lr_scheduler_configs(self) -> list[LRSchedulerConfig]:
        """The learning-rate schedulers and when they step."""
        return run.schedulers if (run := self._runner.trained) is not None else []

    @property
    def loggers(self) -> list[Logger]:
        """The loggers; they may be set, and the list may be changed, between runs."""
        return self._loggers

    @loggers.setter
    def loggers(self, loggers: Iterable[Logger] | None) -> None:
        self._loggers[:] = checked_loggers(loggers)

    @property
    def logger(self) -> Logger | None:
        """The first logger, or None. Setting it replaces all loggers."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Logger | None) -> None:
        self.loggers = [] if logger is None else [logger]

    # ------------------------------------------------------------------------------------------------ processes

    @property
    def global_rank(self) -> int:
        """This process's rank among all processes."""
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
        """Whether this is the process of rank 0, which writes and prints."""
        return self.fabric.is_global_zero

    @property
    def num_devices(self) -> int:
        """The number of devices on this node."""
        return max(1, self.world_size // self.num_nodes)

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return self.strategy.num_nodes

    @property
    def device_ids(self) -> list[int]:
        """The indices of the devices on this node."""
        return [i if d.index is None else d.index for i, d in enumerate(self.strategy.parallel_devices)]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """The number of replicas and the rank, for samplers; None on one process."""
        return self.strategy.distributed_sampler_kwargs

    # ------------------------------------------------------------------------------------------------ paths

    @property
    def default_root_dir(self) -> str:
        """The folder that logs and checkpoints go to unless they have one of their own."""
        return self._settings.default_root_dir

    @property
    def log_dir(self) -> str | None:
        """The first logger's folder, the same on every rank; ``default_root_dir`` without loggers."""
        if self._runner.session is not None and self._runner.session.log_dir is not None:
            return self._runner.session.log_dir
        return (self.loggers[0].log_dir or self.default_root_dir) if self.loggers else self.default_root_dir

    @property
    def ckpt_path(self) -> str | None:
        """The checkpoint that the current or last run was started from."""
        return self._runner.session.ckpt_path if self._runner.session is not None else None

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
    def state(self) -> TrainerState:
        """What runs (``fn``, ``stage``), and how it goes (``status``)."""
        return self._runner.state

    @property
    def fit_progress(self) -> FitProgress:
        """How far fit has come."""
        return self._runner.progress

    training = StageFlag(RunningStage.TRAINING, "Whether fit is training now, and not validating.")

    validating = StageFlag(RunningStage.VALIDATING, "Whether validation runs, inside fit or by ``validate``.")

    testing = StageFlag(RunningStage.TESTING, "Whether testing runs.")

    predicting = StageFlag(RunningStage.PREDICTING, "Whether prediction runs.")

    sanity_checking = StageFlag(RunningStage.SANITY_CHECKING, "Whether the sanity check runs.")

    @property
    def evaluating(self) -> bool:
        """Whether batches are evaluated: by a validation, a test or the sanity check."""
        return self.state.stage is not None and self.state.stage.evaluating

    @property
    def interrupted(self) -> bool:
        """Whether the last run ended early: True after Ctrl-C, a signal or an error."""
        return self.state.status is TrainerStatus.INTERRUPTED

    @property
    def received_sigterm(self) -> bool:
        """Whether SIGTERM, or the signal with which SLURM announces the end, ended the last run."""
        return self._runner.session is not None and self._runner.session.terminated

    @property
    def is_last_batch(self) -> bool:
        """Whether the current training batch is known to be the epoch's last; False in the hooks of a stream's last."""
        return self.fit_progress.is_last_batch

    @property
    def validation_due(self) -> bool:
        """Whether validation follows right after the current batch's ``on_train_batch_end``."""
        return self.fit_progress.validation_due

    @property
    def global_step(self) -> int:
        """The number of batches so far at which an optimizer stepped; several optimizers in a batch count once."""
        return self.fit_progress.step

    @property
    def fit_loop(self) -> FitLoopView:
        """The counters and bounds of fit under the names of Lightning's loops."""
        return FitLoopView(self, self._runner.fitting)

    @property
    def _accelerator_connector(self) -> ConnectorView:
        return ConnectorView(self)

    _checkpoint_connector = _accelerator_connector

    @property
    def validate_loop(self) -> EvaluationLoopView:
        """What ``validate`` runs over."""
        return EvaluationLoopView(self, "val")

    @property
    def test_loop(self) -> EvaluationLoopView:
        """What ``test`` runs over."""
        return EvaluationLoopView(self, "test")

    @property
    def predict_loop(self) -> EvaluationLoopView:
        """What ``predict`` runs over."""
        return EvaluationLoopView(self, "predict")

    @property
    def current_epoch(self) -> int:
        """The number of completed epochs, which inside an epoch is its number from 0."""
        return self.fit_progress.epoch

    # ------------------------------------------------------------------------------------------------ settings

    fast_dev_run = Setting[int]("The number of batches of a trial run; 0 without ``fast_dev_run``.")

    @property
    def on_save_error(self) -> str:
        """What happens when a checkpoint cannot be written: "raise" or "warn"."""
        return self._settings.on_save_error

    @property
    def max_epochs(self) -> int | None:
        """The largest number of epochs; -1 where there is no bound. It may be set before a fit that goes on."""
        return self._settings.durations.max_epochs

    @max_epochs.setter
    def max_epochs(self, epochs: int | None) -> None:
        self._bound(max_epochs=epochs)

    @property
    def min_epochs(self) -> int | None:
        """The smallest number of epochs."""
        return self._settings.durations.min_epochs

    @min_epochs.setter
    def min_epochs(self, epochs: int | None) -> None:
        self._bound(min_epochs=epochs)

    @property
    def max_steps(self) -> int:
        """The largest number of steps; -1 where there is no bound. It may be set before a fit that goes on."""
        return self._settings.durations.max_steps

    @max_steps.setter
    def max_steps(self, steps: int) -> None:
        self._bound(max_steps=steps)

    @property
    def min_steps(self) -> int | None:
        """The smallest number of steps."""
        return self._settings.durations.min_steps

    @min_steps.setter
    def min_steps(self, steps: int | None) -> None:
        self._bound(min_steps=steps)

    def _bound(self, **bounds: Any) -> None:
        self._settings.durations = change_durations(self._settings.durations, **bounds)
        if self._runner.fitting is not None:
            self._runner.fitting.bound_steps()

    log_every_n_steps = Setting[int]("The steps between two writes of step values to the loggers.")
    limit_train_batches = Setting[int | float]("The limit on training batches.")
    limit_val_batches = Setting[int | float]("The limit on validation batches.")
    limit_test_batches = Setting[int | float]("The limit on test batches.")
    limit_predict_batches = Setting[int | float]("The limit on batches to predict.")
    overfit_batches = Setting[int | float]("The number or fraction of batches to overfit on; 0.0 (the default): none.")
    val_check_interval = Setting[Any](
        "``val_check_interval`` as given: batches, a fraction of an epoch, or a duration."
    )
    check_val_every_n_epoch = Setting[int | None]("The epochs between two validations.")
    num_sanity_val_steps = Setting[int | float]("The batches of the sanity check; infinity for all.")
    gradient_clip_val = Setting[float | None]("The largest gradient norm or value; None clips nothing.")
    gradient_clip_algorithm = Setting[str | None]('What ``gradient_clip_val`` limits: "norm" or "value".')
    reload_dataloaders_every_n_epochs = Setting[int]("The epochs after which fit asks for its loaders anew; 0: never.")
    enable_autolog_hparams = Setting[bool]("Whether fit logs hyper-parameters when it starts.")
    barebones = Setting[bool]("Whether everything is off that costs time.")

    @property
    def val_check_batch(self) -> float:
        """The batches between two validations; infinity where epochs or time decide."""
        return self._runner.fitting.val_check_batch if self._runner.fitting is not None else math.inf

    @property
    def accumulate_grad_batches(self) -> int:
        """The batches of one optimizer step; a callback may set it between epochs."""
        return self._settings.accumulate_grad_batches

    @accumulate_grad_batches.setter
    def accumulate_grad_batches(self, batches: int) -> None:
        self._settings.accumulate_grad_batches = check_integer("accumulate_grad_batches", batches, minimum=1)

    # ------------------------------------------------------------------------------------------------ loaders

    @property
    def train_dataloader(self) -> Any:
        """The training loader of the current or last fit, as this rank iterates it; several as they were given."""
        data = self._runner.fitting.data if self._runner.fitting is not None else None
        return data.shown if data is not None else None

    def _loaders(self, stage: str) -> Any:
        data = self._runner.session.evaluations.get(stage) if self._runner.session is not None else None
        if data is None:
            return None
        return data.loaders[0] if len(data.loaders) == 1 else data.loaders

    def _num_batches(self, stage: str) -> list[float]:
        data = self._runner.session.evaluations.get(stage) if self._runner.session is not None else None
        return data.num_batches if data is not None else []

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
        data = self._runner.fitting.data if self._runner.fitting is not None else None
        return data.num_batches if data is not None else math.inf

    @property
    def num_val_batches(self) -> list[float]:
        """The validation batches of each loader."""
        return self._num_batches("val")

    @property
    def num_sanity_val_batches(self) -> list[float]:
        """The sanity-check batches of each loader."""
        return self._settings.sanity_batches(self.num_val_batches)

    @property
    def num_test_batches(self) -> list[float]:
        """The test batches of each loader."""
        return self._num_batches("test")

    @property
    def num_predict_batches(self) -> list[float]:
        """The batches to predict of each loader."""
        return self._num_batches("predict")

    @property
    def enable_validation(self) -> bool:
        """Whether fit validates: there is a ``validation_step``, a loader, and the limit is not 0."""
        return self._runner.fitting is not None and self._runner.fitting.validates

    @property
    def estimated_stepping_batches(self) -> float:
        """The optimizer steps of the whole fit, for schedulers made in ``configure_optimizers``; infinity if unbounded.

        Asks for the training loader if that was not done yet.
        """
        if self._runner.fitting is None:
            raise MisconfigurationException("estimated_stepping_batches is known in fit only.")
        return self._runner.fitting.estimated_steps()

    # ------------------------------------------------------------------------------------------------ metrics

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The newest value of everything logged, as scalar tensors."""
        return self._runner.metrics.callback

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The newest value of what goes to the loggers."""
        return self._runner.metrics.logged

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """What the progress bar shows; reading it brings the values to the host."""
        return self._runner.metrics.bar

    def metrics_on_cpu(self) -> Metrics:
        """Return a copy of the metrics that can be sent to another process."""
        return self._runner.metrics.detached()

    def take_outcome(
        self, module: LightningModule, state: TrainerState, progress: FitProgress, metrics: Metrics, should_stop: bool
    ) -> None:
        """Take over the outcome of a run in another process."""
        self.should_stop = should_stop
        self._runner.take_outcome(module, state, progress, metrics)

    # ------------------------------------------------------------------------------------------------ for modules

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Return a context in which new modules are on the device and in the precision of this trainer.

        Processes that are to be started are started now. For large models, :meth:`LightningModule.configure_model` is
        the place that works with every strategy.

        Args:
            empty_init: Leave the weights uninitialized, for a checkpoint that is loaded next. Default: False.

        Raises:
            MisconfigurationException: The strategy starts its processes for a stage only.
        """
        if self.strategy.launches_function:
            raise MisconfigurationException(
                f"trainer.init_module: {type(self.strategy).__name__} starts its processes in `fit`, and only there it "
                "is known which device the module is for. Build the module's layers in its `configure_model`."
            )
        self.fabric.launch()
        return self.fabric.init_module(empty_init=empty_init)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0 only, above the progress bar."""
        bar = self.progress_bar_callback
        if self.is_global_zero:
            (print if bar is None else bar.print)(*args, **kwargs)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run backward in manual optimization, with its hooks; modules call it as ``self.manual_backward``."""
        manual_backward(self._ready_run("manual_backward"), loss, *args, **kwargs)

    def clip_gradients(self, optimizer: Optimizer, value: float | None = None, algorithm: str | None = None) -> None:
        """Clip gradients; modules call it as ``self.clip_gradients``."""
        run, settings = self._ready_run("clip_gradients"), self._settings
        Clipping(run, settings.gradient_clip_val, settings.gradient_clip_algorithm).clip(optimizer, value, algorithm)

    def _ready_run(self, what: str, where: str = "inside fit") -> ReadyRun:
        run = self._run
        if not isinstance(run, ReadyRun):
            raise MisconfigurationException(f"{what} needs a module that was set up: call it {where}.")
        return run

    # ------------------------------------------------------------------------------------------------ internals

    def _configure_steps(self) -> None:
        """Tell the strategy what its engine may have to do itself."""
        settings = self._settings
        clip, by_value = settings.gradient_clip_val, settings.gradient_clip_algorithm == "value"
        limits = (None, clip or 0.0) if by_value else (clip, 0.0)
        self.fabric.strategy.configure_steps(settings.accumulate_grad_batches, *limits)

    def _evaluate(
        self,
        fn: TrainerFn,
        model: LightningModule | None,
        dataloaders: Any,
        source: Source,
        verbose: bool,
        datamodule: LightningDataModule | None,
    ) -> list[dict[str, float]]:
        dataloaders, datamodule = preflight.split_datamodule(dataloaders, datamodule)
        module = preflight.model_or_last(model, self._runner.module, fn.value)
        source = self._source(model, *source, fn)
        preflight.check_loaders(dataloaders=dataloaders)
        preflight.check_evaluation(module, fn, dataloaders, datamodule, self.strategy)
        result: list[dict[str, float]] = self._runner.launch(
            self._runner.evaluate, module, datamodule, fn, dataloaders, source, verbose
        )
        return result or []

    def _source(self, model: Any, ckpt_path: PathLike | None, weights_only: bool | None, fn: TrainerFn) -> Source:
        """Which weights an evaluation has: without a model and a checkpoint the best ones of the fit before."""
        if model is None and ckpt_path is None and self._runner.evaluates_trained:
            ckpt_path = preflight.best_checkpoint(self.callbacks, fn)
        return ckpt_path, weights_only

    @property
    def _run(self) -> Run | None:
        return self._runner.run
