"""The Trainer: everything around ``training_step``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import torch

from treadle.callbacks import Callback
from treadle.callbacks.checkpoint import tolerated
from treadle.checkpoint.content import dump_checkpoint
from treadle.checkpoint.exact import capture_exact, restore_exact
from treadle.checkpoint.find import find_checkpoint, find_newest, preempted_path
from treadle.checkpoint.restore import read_checkpoint, restore_training, restore_weights
from treadle.data.evaluation import EvaluationData
from treadle.data.find import find_loaders
from treadle.data.training import TrainingData
from treadle.data.transfer import make_transfer
from treadle.loops.epoch import TrainingEpoch
from treadle.loops.evaluate import Evaluation
from treadle.loops.fit import FitLoop
from treadle.loops.predict import Prediction
from treadle.metrics.bus import Results
from treadle.metrics.latest import Metrics
from treadle.metrics.table import print_results
from treadle.metrics.values import to_floats
from treadle.module import LightningDataModule, LightningModule
from treadle.run.dispatch import Dispatch, with_model_callbacks
from treadle.run.progress import FitProgress
from treadle.run.run import Run
from treadle.run.signals import Signals, SIGTERMException, announcing_signal, claim_together, during_a_save, meet
from treadle.stages import RunningStage, TrainerFn, TrainerState, TrainerStatus
from treadle.trainer import assembly, preflight
from treadle.trainer.outcome import Outcome, adopt, run_and_capture
from treadle.trainer.settings import choose_callbacks, choose_loggers, resolve_settings
from treadle.trainer.view import TrainerView
from treadle_fabric import (
    Fabric,
    MisconfigurationException,
    PathLike,
    claim_failure,
    on_rank_zero,
    rank_zero_info,
    rank_zero_warn,
    suggests_arguments,
)
from treadle_fabric.accelerators import Accelerator
from treadle_fabric.loggers import Logger
from treadle_fabric.strategies import Strategy

__all__ = ["Trainer"]

Source: TypeAlias = tuple[PathLike | None, bool | None]
"""Which checkpoint, and whether it must hold nothing but weights and plain data."""


class Trainer(TrainerView):
    """Trains, validates, tests and predicts with a :class:`treadle.LightningModule`.

    Args:
        accelerator: "cpu", "cuda", "mps", "gpu" or "auto" (the best there is).
        strategy: "auto", "ddp", "ddp_spawn", ... or a strategy object.
        devices: a number, a list of indices, "0,1", -1 or "auto" (all).
        num_nodes: nodes.
        precision: "32-true" (default), "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", and short names.
        logger: True (default: TensorBoard, or CSV where that is not installed), False, a logger or a list.
        callbacks: a callback or a list.
        fast_dev_run: run n (True: 1) batches of everything, without loggers and checkpoints.
        max_epochs: default: 1000 where nothing else bounds the run; -1 for no bound.
        min_epochs: do not stop before.
        max_steps: optimizer steps; -1 for no bound.
        min_steps: do not stop before.
        max_time: "DD:HH:MM:SS", a timedelta or a dict of its arguments.
        limit_train_batches: a number of batches (int) or a fraction (float). Default: 1.0.
        limit_val_batches: the same for validation.
        limit_test_batches: the same for testing.
        limit_predict_batches: the same for prediction.
        overfit_batches: train and validate on this many batches (or this fraction), without shuffling.
        val_check_interval: batches (int), a fraction of an epoch (float) or a duration. Default: 1.0.
        check_val_every_n_epoch: epochs between validations; None counts batches across epochs.
        num_sanity_val_steps: validation batches to try before training. Default: 2; -1 for all.
        log_every_n_steps: how often step values go to the loggers. Default: 50.
        enable_checkpointing: whether there is a ModelCheckpoint by default. Default: True.
        enable_progress_bar: default: True.
        enable_model_summary: default: True.
        accumulate_grad_batches: batches of one optimizer step.
        gradient_clip_val: the largest gradient norm or value; None clips nothing.
        gradient_clip_algorithm: "norm" (default) or "value".
        deterministic: True refuses non-deterministic operations, "warn" warns of them.
        benchmark: ``torch.backends.cudnn.benchmark`` during the run.
        inference_mode: evaluate under ``torch.inference_mode`` rather than ``torch.no_grad``.
        use_distributed_sampler: share the samples of loaders out over the ranks.
        profiler: None; profilers are not there yet.
        detect_anomaly: find the operation that made a NaN gradient.
        barebones: turn off everything that costs time: bar, loggers, checkpoints, summary, sanity check, callbacks.
        plugins: precision, cluster environment and checkpoint IO objects.
        sync_batchnorm: share batch-norm statistics over the ranks.
        reload_dataloaders_every_n_epochs: ask for the training loader anew every n epochs; 0 never.
        default_root_dir: where logs and checkpoints go. Default: the working directory.
        enable_autolog_hparams: log hyper-parameters when fit starts.
        model_registry: not used; there for scripts that pass it.
        auto_resume: fit without ``ckpt_path`` goes on from the newest checkpoint that is whole, if there is one.
        on_save_error: "warn": training goes on where a checkpoint could not be written. Default: "raise".
        on_nonfinite: what a loss or gradient that is NaN or infinite does: "raise" NonFiniteError, "skip" the step, or
            "warn". Costs one wait for the device a step, and copies of batch and buffers. Default: nobody looks.

    Raises:
        MisconfigurationException: an argument is wrong; nothing has been started then.
    """

    @suggests_arguments
    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: str | int | None = None,
        logger: Logger | Iterable[Logger] | bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
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
        profiler: Any | None = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        plugins: Any | None = None,
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
        self.callbacks = choose_callbacks(callbacks, settings)
        self._loggers = choose_loggers(given["logger"], settings)
        self.fabric = Fabric(
            accelerator=accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=num_nodes,
            precision="32-true" if precision is None and plugins is None else precision,
            plugins=plugins,
            loggers=self._loggers,
        )
        self.state = TrainerState()
        self.should_stop = False
        self.fit_progress = FitProgress()
        self._metrics = Metrics()
        self._signals = Signals(announcing_signal(self.fabric.strategy))
        self._run: Run | None = None
        self._module: LightningModule | None = None
        self._datamodule: LightningDataModule | None = None
        self._fit_loop: FitLoop | None = None
        self._train_data: TrainingData | None = None
        self._eval_data: dict[str, EvaluationData] = {}
        self._ckpt_path: str | None = None
        self._log_dir: str | None = None
        self._make_training_data: Callable[[], TrainingData | None] | None = None
        self._sigterm = False
        self._unrestored: dict[str, Any] = {}  # what a run needs from its checkpoint to go on exactly, until it has it

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
        """Train, from the beginning unless ``ckpt_path`` says otherwise. Ctrl-C ends it; ``interrupted`` tells then.

        Args:
            model: the module.
            train_dataloaders: an iterable of batches, several of them, or a data module.
            val_dataloaders: an iterable of batches, or a list of them.
            datamodule: gives the loaders instead.
            ckpt_path: resume from this checkpoint: a path, "last", "best" or "hpc".
            weights_only: False unpickles arbitrary objects from it; only for files you trust. Default: True.

        Raises:
            MisconfigurationException: module, loaders and settings do not fit together; nothing has been started then.
            CheckpointError: the checkpoint is missing, damaged or does not fit.
        """
        train_dataloaders, datamodule = preflight.split_datamodule(train_dataloaders, datamodule)
        preflight.check_model(model, "fit")
        preflight.check_loaders(train_dataloaders=train_dataloaders, val_dataloaders=val_dataloaders)
        preflight.check_fit(model, self._settings, train_dataloaders, val_dataloaders, datamodule)
        self.should_stop = False
        self._launch(self._fit, model, datamodule, train_dataloaders, val_dataloaders, (ckpt_path, weights_only))

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
            model: the module; default: the one of the last run, with the weights it has now.
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
            model: the module; default: the one of the last run.
            dataloaders: an iterable of batches, a list of them, or a data module.
            datamodule: gives the loaders instead.
            return_predictions: keep what the steps return. Default: True. "stream": give it out one batch at a time, so
                that no more than one batch of each rank is in memory; the trainer is busy until the end, and on several
                ranks each has to go through all of it.
            ckpt_path: load these weights first: a path, "best" or "last".
            weights_only: False unpickles arbitrary objects from the checkpoint. Default: True.

        Returns:
            What ``predict_step`` returned for each batch, on the CPU, in the order of the loader; a list of such lists
            with several loaders; None where predictions are not kept. Ranks take turns with the batches, and each gets
            the whole. Of a loader that shares itself out (a stream, say), and of a ``CombinedLoader`` that runs side by
            side, a rank gets its own part.
        """
        dataloaders, datamodule = preflight.split_datamodule(dataloaders, datamodule)
        module = preflight.model_or_last(model, self._module, "predict")
        preflight.check_loaders(dataloaders=dataloaders)
        preflight.check_predict(module, dataloaders, datamodule)
        preflight.check_return_predictions(return_predictions, self.strategy)
        if return_predictions == "stream":
            self.fabric.launch()
            stream = self._stream(module, datamodule, dataloaders, (ckpt_path, weights_only))
            next(stream)  # what is wrong is said here, not at the first batch
            return stream
        keep = return_predictions is not False
        found = self._launch(self._predict, module, datamodule, dataloaders, (ckpt_path, weights_only), keep)
        return cast("list[Any] | None", found)

    @during_a_save
    def save_checkpoint(
        self, filepath: PathLike, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; every rank calls it.

        Args:
            filepath: where to; a local path or an fsspec URL.
            weights_only: leave out optimizers, schedulers and callbacks. Default: False.
            storage_options: for the checkpoint IO.
        """
        if self._run is None or self._run.wrapped is None:
            raise MisconfigurationException(
                "save_checkpoint needs a module that was set up: call it in or after fit, validate or test."
            )
        checkpoint = dump_checkpoint(self._run, self.callbacks, weights_only=bool(weights_only))
        if not weights_only and self.state.fn is TrainerFn.FITTING:
            exact = self._unrestored or capture_exact(
                self._run, self._train_data, accumulate=self.accumulate_grad_batches
            )
            checkpoint["treadle"] |= {**exact, "should_stop": self.should_stop}
            for logger in self.loggers:  # a run resumed from here does not log again what came before
                logger.save()
        self.strategy.save_checkpoint(filepath, checkpoint, storage_options=storage_options)

    # ------------------------------------------------------------------------------------------------ a run

    def _launch(self, stage: Callable[..., Any], *args: Any) -> Any:
        """Run a stage in every process; this one is rank 0, or waits for it."""
        if not self.strategy.launches_function:
            self.fabric.launch()
            return stage(*args)
        outcome: Outcome = self.fabric.launch(partial(run_and_capture, self, stage), *args)
        adopt(self, args[0], outcome)
        return outcome.result

    @contextmanager
    def _running(
        self, fn: TrainerFn, module: LightningModule, datamodule: LightningDataModule | None
    ) -> Generator[Run]:
        """Everything around a stage: who is attached, what is seeded, and what happens when it fails."""
        preflight.check_idle(self.state, fn)
        self.state = TrainerState(fn=fn, status=TrainerStatus.RUNNING)
        self._module, self._datamodule, self._metrics = module, datamodule, Metrics()
        self._eval_data, self._sigterm = {}, False
        if fn is TrainerFn.FITTING:
            self.fit_progress, self._fit_loop, self._train_data, self._unrestored = FitProgress(), None, None, {}
        results = Results(training=fn is TrainerFn.FITTING, fabric=self.fabric)
        results.belongs_to(module)
        if datamodule is not None:
            datamodule.trainer = self
        try:
            with ExitStack() as stack:
                stack.enter_context(preflight.backend_flags(self._settings))
                if fn is TrainerFn.FITTING:
                    stack.enter_context(self._signals)
                if self._settings.detect_anomaly:
                    stack.enter_context(torch.autograd.set_detect_anomaly(True))
                module.attach(self, results)
                results.hook = "configure_callbacks"
                self.callbacks = with_model_callbacks(self.callbacks, module)
                results.hook = ""
                dispatch = Dispatch(self, module, self.callbacks)
                dispatch.results = self._metrics.active = results
                self._run = run = Run(
                    self.fabric, module, datamodule, dispatch, self.state, self._metrics, results, self.loggers,
                    self.fit_progress, [m for m in module.modules() if isinstance(m, LightningModule)],
                )  # fmt: skip
                self._log_dir = None
                self._log_dir = self.fabric.broadcast(self.log_dir)
                self._setup_hooks(run)
                yield run
                self._finish(run)
        except KeyboardInterrupt as interrupt:
            self.state.status = TrainerStatus.INTERRUPTED
            self._failed(interrupt)
            rank_zero_info(
                "Interrupted: fit has ended, its state is intact, and your script goes on; `trainer.interrupted` tells."
                if self.world_size == 1
                else "Interrupted: fit has ended, and your script goes on; `trainer.interrupted` tells. The ranks may"
                " stand at different batches, so do not save now; SIGTERM saves, and ends all after the same batch."
            )
        except BaseException as error:
            self._sigterm, together = isinstance(error, SIGTERMException), getattr(error, "together", False)
            if together:
                claim_together(error, self.strategy)
            elif not self._sigterm or self.is_global_zero:
                claim_failure(error)
            self.state.status = TrainerStatus.INTERRUPTED
            self._failed(error)
            if together:  # who started the ranks may end the others, which still write, once the first is gone
                meet(self.strategy)
            raise
        finally:
            self.state.stage = None
            self._metrics.keep(results)
            self._metrics.active = None
            self.strategy.precision.teardown()
            module.attach(self)
            self.fabric.callbacks[:] = [c for c in self.fabric.callbacks if c is not module]

    def _setup_hooks(self, run: Run) -> None:
        """prepare_data, setup, configure_model."""
        fn, module, datamodule, dispatch = self.state.fn, run.module, run.datamodule, run.dispatch
        assert fn is not None
        for owner in [o for o in (datamodule, module) if o is not None]:
            per_node = getattr(owner, "prepare_data_per_node", True)
            if (self.local_rank if per_node else self.global_rank) == 0:
                dispatch.run("prepare_data", owner.prepare_data)
        self.fabric.barrier("prepare_data")
        if datamodule is not None:
            dispatch.run("setup", datamodule.setup, fn.value)
        dispatch.call("setup", fn.value)
        with self.fabric.init_module():
            dispatch.run("configure_model", module.configure_model)
        if self._settings.sync_batchnorm and self.world_size > 1:
            assembly.share_batch_norm(module, self.fabric.device)

    def _finish(self, run: Run) -> None:
        fn = self.state.fn
        assert fn is not None
        if fn is TrainerFn.FITTING:
            run.dispatch.call("on_fit_end")
        if run.datamodule is not None:
            run.dispatch.run("teardown", run.datamodule.teardown, fn.value)
        run.dispatch.call("teardown", fn.value)
        for logger in self.loggers:
            logger.finalize("success")
        with tolerated(self):
            self.strategy.checkpoint_io.teardown()  # waits for what is being written
        self.state.status = TrainerStatus.FINISHED

    def _failed(self, error: BaseException) -> None:
        """on_exception for everybody, then the loggers are closed; a second error must not hide the first."""
        run = self._run
        calls: list[Callable[[], Any]] = [partial(logger.finalize, "failed") for logger in self.loggers]
        if run is not None and run.module is self._module:
            told = list(run.dispatch.listeners("on_exception"))
            told += [run.datamodule.on_exception] if run.datamodule is not None else []
            calls = [*(partial(run.dispatch.run, "on_exception", listener, error) for listener in told), *calls]
        calls.append(self.strategy.checkpoint_io.teardown)
        for call in calls:
            try:
                call()
            except Exception as second:
                rank_zero_warn(f"{type(error).__name__} ended the run, and then came {second!r}.")

    # ------------------------------------------------------------------------------------------------ the stages

    def _prepare(self, run: Run, source: Source) -> dict[str, Any] | None:
        """Weights from a checkpoint, then the module to its device and into its engine."""
        ckpt_path, weights_only = source
        fitting = self.state.fn is TrainerFn.FITTING

        def find() -> str | None:
            path = find_checkpoint(ckpt_path, self.callbacks, self.default_root_dir, fitting=fitting)
            if path is None and fitting and self._settings.auto_resume:
                path = find_newest(self.callbacks, self.loggers, self.default_root_dir)
            return path

        path = self._ckpt_path = on_rank_zero(self.strategy, find, "found no checkpoint to start from")
        checkpoint: dict[str, Any] | None = None
        if path is not None:
            rank_zero_info(f"Restoring from {path}.")
            checkpoint = read_checkpoint(self.strategy, path, weights_only, training=fitting)
            restore_weights(run, checkpoint, self.callbacks, training=fitting)
        run.wrapped = self.fabric.setup_module(run.module)
        run.transfer = make_transfer(run.module, run.datamodule, self.fabric.device, run.dispatch.run)
        return checkpoint

    def _fit(
        self,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        train: Any,
        val: Any,
        source: Source,
    ) -> None:
        with self._running(TrainerFn.FITTING, module, datamodule) as run:
            checkpoint = self._prepare(run, source)
            self._make_training_data = partial(assembly.training_data, run, self._settings, train)
            assembly.set_up_optimizers(run, self._settings)
            run.dispatch.call("on_fit_start")
            assembly.log_hyperparameters(run, self._settings)
            if checkpoint is not None:
                restore_training(run, checkpoint)
                self._unrestored = checkpoint.get("treadle", {})
                self.should_stop |= bool(self._unrestored.get("should_stop", False))
                del checkpoint
            validation = self._make_validation(run, val)
            self._fit_loop = loop = FitLoop(
                run,
                self._settings.durations,
                self,
                sanity=self.num_sanity_val_batches,
                validation=validation,
                make_epoch=partial(self._make_epoch, run),
                make_validation=partial(self._make_validation, run, val),
                restore=partial(self._restore_exact, run),
                reload_every=self._settings.reload_dataloaders_every_n_epochs,
            )
            try:
                loop.run()
            except SIGTERMException:
                with tolerated(self, always=True):
                    if self._settings.enable_checkpointing:
                        self.save_checkpoint(path := preempted_path(self.callbacks, self.default_root_dir))
                        rank_zero_info(f"Asked to terminate: saved {path}. ckpt_path='last' goes on from there.")
                raise

    def _restore_exact(self, run: Run) -> None:
        """What a resumed run had in the middle of things, once."""
        if self._unrestored:
            assert self._train_data is not None
            restore_exact(run, self._unrestored, self._train_data, accumulate=self.accumulate_grad_batches)
            self._unrestored = {}

    def _make_epoch(self, run: Run, loop: FitLoop) -> TrainingEpoch | None:
        if loop.epoch is not None or self._train_data is None:  # the first may have been asked for already
            assert self._make_training_data is not None
            before, self._train_data = self._train_data, self._make_training_data()
            if before is not None and self._train_data is not None:
                self._train_data.epochs.follow(before.epochs)
        data = self._train_data
        return None if data is None else assembly.make_epoch(run, self._settings, data, loop, self, self._signals)

    def _make_validation(self, run: Run, val: Any) -> Evaluation | None:
        loaders = assembly.validation_loaders(run, self._settings, val)
        return None if loaders is None else self._make_evaluation(run, loaders, "val", "validation")

    def _make_evaluation(self, run: Run, loaders: Any, stage: str, name: str) -> Evaluation:
        self._eval_data[stage] = data = assembly.evaluation_data(run, self._settings, loaders, stage)
        return assembly.make_evaluation(run, self._settings, data, name)

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
        module = preflight.model_or_last(model, self._module, fn.value)
        preflight.check_loaders(dataloaders=dataloaders)
        preflight.check_evaluation(module, fn, dataloaders, datamodule)
        result: list[dict[str, float]] = self._launch(
            self._evaluate_stage, module, datamodule, fn, dataloaders, source, verbose
        )
        return result or []

    def _evaluate_stage(
        self,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        fn: TrainerFn,
        dataloaders: Any,
        source: Source,
        verbose: bool,
    ) -> list[dict[str, float]]:
        validating = fn is TrainerFn.VALIDATING
        stage, name = ("val", "validation") if validating else ("test", "test")
        found: list[dict[str, float]] = []
        with self._running(fn, module, datamodule) as run:
            self._prepare(run, source)
            loaders = run.dispatch.run(
                f"{stage}_dataloader", find_loaders, dataloaders, f"{stage}_dataloader", module, datamodule
            )
            evaluation = self._make_evaluation(run, loaders, stage, name)
            self.state.stage = RunningStage.VALIDATING if validating else RunningStage.TESTING
            found = [to_floats(metrics) for metrics in evaluation() or []]
        if verbose and self.is_global_zero:
            print_results(found, fn.value)
        return found

    def _predict(
        self,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        dataloaders: Any,
        source: Source,
        keep: bool,
    ) -> list[Any] | None:
        predictions: list[Any] | None = None
        with self._running(TrainerFn.PREDICTING, module, datamodule) as run:
            predictions = self._prediction(run, dataloaders, source, keep=keep)()
        return predictions

    def _stream(
        self, module: LightningModule, datamodule: LightningDataModule | None, dataloaders: Any, source: Source
    ) -> Iterator[Any]:
        with self._running(TrainerFn.PREDICTING, module, datamodule) as run:
            prediction = self._prediction(run, dataloaders, source, keep=True)
            try:
                yield None
                yield from prediction.stream()
            except GeneratorExit:  # whoever asked has enough, which is no failure
                pass

    def _prediction(self, run: Run, dataloaders: Any, source: Source, *, keep: bool) -> Prediction:
        self._prepare(run, source)
        name = "predict_dataloader"
        loaders = run.dispatch.run(name, find_loaders, dataloaders, name, run.module, run.datamodule)
        self._eval_data["predict"] = data = assembly.evaluation_data(run, self._settings, loaders, "predict")
        self.state.stage = RunningStage.PREDICTING
        return Prediction(run, data, inference_mode=self._settings.inference_mode, keep=keep)
