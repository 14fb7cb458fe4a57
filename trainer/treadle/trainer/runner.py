"""Run the stages of a trainer: fit, validate, test and predict."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from treadle.callbacks import Callback
from treadle.callbacks.checkpoint import tolerated
from treadle.checkpoint.content import dump_checkpoint, keeping
from treadle.checkpoint.find import (
    claim_requeue_path,
    find_checkpoint,
    find_newest,
    find_own,
    newer,
    preempted_path,
    release_requeue_path,
)
from treadle.checkpoint.loggers import go_on_logging, read_logger_states
from treadle.checkpoint.restore import read_checkpoint, restore_training, restore_weights
from treadle.data.find import find_loaders, gives_loaders
from treadle.loops.evaluate import Evaluation
from treadle.loops.predict import Prediction
from treadle.loops.stopping import Controls
from treadle.metrics.latest import Metrics
from treadle.metrics.table import print_results
from treadle.metrics.values import to_floats
from treadle.module import LightningDataModule, LightningModule
from treadle.run.dispatch import Dispatch, with_model_callbacks
from treadle.run.progress import FitProgress
from treadle.run.run import ReadyRun, Run
from treadle.run.signals import Signals, SIGTERMException, during_a_save
from treadle.searches import Snapshot
from treadle.stages import TrainerFn, TrainerState, TrainerStatus
from treadle.trainer import assembly, preflight
from treadle.trainer.continuation import Continuation, Fits
from treadle.trainer.fitting import Fitting
from treadle.trainer.outcome import launch, raise_asked_for
from treadle.trainer.session import Session
from treadle.trainer.settings import Settings
from treadle.trainer.trials import LOADERS, Trials, undone
from treadle_fabric import (
    Fabric,
    MisconfigurationException,
    PathLike,
    on_rank_zero,
    rank_zero_info,
    rank_zero_warn,
    user_module,
)
from treadle_fabric.accelerators import garbage_collection_cuda
from treadle_fabric.loggers import Logger

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = ["Runner", "Source"]

T = TypeVar("T")
Source: TypeAlias = tuple[PathLike | None, bool | None]
"""Which checkpoint, and whether it must hold nothing but weights and plain data."""


class _FitsEnded:
    """How many fits this process has done; a job that is queued again runs the script, with its fits, in order."""

    count = 0


_fits_ended = _FitsEnded()


class Runner:
    """Runs the stages of a trainer one after the other, and keeps what the trainer shows of the last one.

    Args:
        trainer: The trainer, with its runtime, callbacks and loggers.
        settings: Its settings.
    """

    def __init__(self, trainer: Trainer, settings: Settings) -> None:
        self._trainer, self._settings, self._fabric = trainer, settings, trainer.fabric
        self.state = TrainerState()
        """What runs, and how it goes."""
        self.progress = FitProgress()
        """How far fit has come."""
        self.session: Session | None = None
        """The current or last call of a stage."""
        self.fitting: Fitting | None = None
        """The parts of the current or last fit."""
        self._given: Any = None  # the loaders that the running evaluation got
        environment = self._fabric.strategy.cluster_environment
        self._signals = Signals(environment.announcing_signal() if environment is not None else 0)
        self._job: dict[str, Any] = {"name": environment.job_to_requeue() if environment is not None else "", "fit": 0}
        self._fits = Fits()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: counters, metrics and the last module; nothing runs in it."""
        return {**self.__dict__, "fitting": None}

    @property
    def run(self) -> Run | None:
        """The current or last run; a :class:`ReadyRun` once the module was set up."""
        return self.session.run if self.session is not None else None

    @property
    def trained(self) -> Run | None:
        """The run whose optimizers are the trainer's: that of the fit, also when its module is evaluated afterwards."""
        fit = self.fitting.run if self.fitting is not None else None
        return fit if fit is not None and fit.module is self.module else self.run

    @property
    def module(self) -> LightningModule | None:
        """The module of the current or last run."""
        return self.session.module if self.session is not None else None

    @property
    def evaluates_trained(self) -> bool:
        """Whether the module of the last run is the one that the last fit has trained."""
        fit = self.fitting.run if self.fitting is not None else None
        return fit is None or fit.module is self.module

    @property
    def signals(self) -> Signals:
        """The signals that end a fit after the current batch."""
        return self._signals

    @property
    def metrics(self) -> Metrics:
        """What was logged in the current or last run."""
        return self.session.metrics if self.session is not None else Metrics()

    # Around a stage

    def begin_fit(self, module: LightningModule, *, resumes: bool) -> None:
        """Go on where the last fit of this module ended; see :class:`Fits`."""
        self._job["fit"] = _fits_ended.count + 1
        self._fits.begin(module, self._trainer.callbacks, self._trainer.loggers, resumes=resumes)

    def launch(self, stage: Callable[..., Any], module: LightningModule, *args: Any) -> Any:
        """Run a stage in every process. This process takes part, or waits for processes that the strategy starts."""
        trainer = self._trainer
        try:
            if self._fabric.strategy.launches_function:
                result = launch(trainer, stage, module, args, signals=self._signals if stage == self.fit else None)
            else:
                self._fabric.launch()
                try:
                    result = stage(module, *args)
                finally:
                    self._fits.after_run()
        except SystemExit as end:
            # a fit that a signal ended is to be done again, and one that Ctrl-C ended is not
            _fits_ended.count += stage == self.fit and isinstance(end.__context__, KeyboardInterrupt)
            raise
        except BaseException:
            _fits_ended.count += stage == self.fit
            raise
        _fits_ended.count += stage == self.fit
        raise_asked_for(trainer.callbacks)
        return result

    def take_outcome(
        self, module: LightningModule, state: TrainerState, progress: FitProgress, metrics: Metrics
    ) -> None:
        """Take over the outcome of a run in another process."""
        self.state, self.progress = state, progress
        self.session = Session(self._fabric, module, None, state, metrics)
        if state.fn is TrainerFn.FITTING:
            self._fits.end(Continuation(module, replace(progress)))

    def _open(self, fn: TrainerFn, module: LightningModule, datamodule: LightningDataModule | None) -> Session:
        preflight.check_idle(self.state, fn)
        self.state = TrainerState(TrainerStatus.RUNNING, fn, fn.stage)
        if fn is TrainerFn.FITTING:
            self.progress, self.fitting = self._fits.progress, None
        self.session = session = Session(self._fabric, module, datamodule, self.state)
        return session

    @contextmanager
    def _started(self, session: Session, source: Source, *, alone: bool = False) -> Generator[Run]:
        """Call the hooks before and after a stage; see :class:`Session`. With ``alone`` no callback takes part."""
        trainer = self._trainer
        with session.flagged(self._settings, self._signals):
            stage, auto_resume = str(self.state.fn), self._settings.auto_resume
            preflight.check_same_call(self._fabric, stage, session.datamodule, source[0], auto_resume=auto_resume)
            results = session.attach(trainer)
            if not alone:
                results.hook = "configure_callbacks"
                trainer.callbacks = with_model_callbacks(trainer.callbacks, session.module)
                results.hook = ""
            if self.state.fn is TrainerFn.FITTING and not alone:
                self._choose_run(session, source[0])
            run = session.start(trainer, results, self.progress, self._settings)
            yield run
            session.finish(trainer, run)

    def _choose_run(self, session: Session, ckpt_path: PathLike | None) -> None:
        """Find the checkpoint that a fit starts from, and have the loggers go on in its run or branch from it.

        This comes before the hooks: in ``setup`` the folder of the run is known already. What cannot be found yet is
        looked for again when the module is set up.
        """
        loggers, named = self._trainer.loggers, ckpt_path is not None
        if not named and not self._settings.auto_resume and not self._job["name"]:
            return

        def look() -> tuple[str | None, bool, dict[str, Any]]:
            path, own = None, self._find_own()
            with suppress(MisconfigurationException):  # raised when the module is set up
                if own is None or (not named and self._settings.auto_resume) or ckpt_path == "last":
                    path = self._find(ckpt_path, loggers, self._trainer.callbacks)
            goes_on = own is not None and newer(own, path)
            path = own if goes_on else path
            return path, goes_on, read_logger_states(path) if path is not None and loggers else {}

        if self._settings.auto_resume:
            session.searched = [getattr(callback, "dirpath", None) for callback in self._trainer.callbacks]
        path, own, saved = on_rank_zero(self._fabric.strategy, look, "found no checkpoint to start from")
        session.ckpt_path = path
        if own and named:
            instead = f"instead of ckpt_path={str(ckpt_path)!r}"
            rank_zero_info(f"This job was queued again, and goes on from {path} {instead}.")
        if path is not None and saved:
            same_run = not named or own or str(ckpt_path) in ("last", "hpc")
            go_on_logging(loggers, saved, path, same_run=same_run)

    def _find_own(self) -> str | None:
        """What this fit of a job has saved before the job was queued again."""
        if not self._job["name"]:
            return None
        return find_own(self._job, self._trainer.callbacks, self._trainer.loggers, self._settings.default_root_dir)

    def _find(self, ckpt_path: PathLike | None, loggers: Sequence[Logger], callbacks: Sequence[Callback]) -> Any:
        root, fitting = self._settings.default_root_dir, self.state.fn is TrainerFn.FITTING
        if ckpt_path is None and fitting and self._settings.auto_resume:
            return find_newest(callbacks, loggers, root)
        return find_checkpoint(ckpt_path, callbacks, loggers, root, fitting=fitting)

    def _find_late(self, session: Session, ckpt_path: PathLike | None) -> str | None:
        """Find what the session starts from where nothing was found before the hooks, or nothing was looked for."""
        callbacks = self._trainer.callbacks
        if ckpt_path is None and session.searched:  # some callbacks have got their folders in the meantime
            pairs = zip(callbacks, session.searched, strict=False)
            return find_newest([c for c, before in pairs if getattr(c, "dirpath", None) != before], (), None)
        return cast("str | None", self._find(ckpt_path, self._trainer.loggers, callbacks))

    def _prepare(self, session: Session, run: Run, source: Source) -> tuple[ReadyRun, dict[str, Any] | None]:
        """Restore weights from a checkpoint, and bring the module to its device and into its engine."""
        (ckpt_path, weights_only), fitting = source, self.state.fn is TrainerFn.FITTING
        callbacks, strategy = self._trainer.callbacks, self._fabric.strategy
        path = session.ckpt_path
        if path is None:
            find = partial(self._find_late, session, ckpt_path)
            path = session.ckpt_path = on_rank_zero(strategy, find, "found no checkpoint to start from")
        if path is None and ckpt_path == "last":
            rank_zero_warn(
                "ckpt_path='last' is set, but there is no last checkpoint available: training starts from the"
                " beginning."
            )
        checkpoint: dict[str, Any] | None = None
        if path is not None:
            rank_zero_info(f"Restoring states from the checkpoint path at {path}")
            checkpoint = read_checkpoint(run, path, weights_only, training=fitting)
        late = strategy.restores_after_setup
        if checkpoint is not None and not late:
            restore_weights(run, run.module, checkpoint, callbacks, training=fitting)
        session.run = ready = assembly.set_up(run, self._settings)
        if checkpoint is not None and late:
            restore_weights(run, ready.engine, checkpoint, callbacks, training=fitting)
        return ready, checkpoint

    # The stages

    def fit(
        self, module: LightningModule, datamodule: LightningDataModule | None, train: Any, val: Any, source: Source
    ) -> None:
        """Train."""
        trainer, session = self._trainer, self._open(TrainerFn.FITTING, module, datamodule)
        with session.guarded(trainer), self._started(session, source) as run:
            self.fitting = fitting = Fitting(
                session, run, self._settings, train, val, controls=trainer, signals=self._signals
            )
            ready, checkpoint = self._prepare(session, run, source)
            assembly.set_up_optimizers(ready)
            ready.dispatch.call("on_fit_start")
            assembly.log_hyperparameters(ready, self._settings)
            exact = self._fits.exact
            if checkpoint is not None:
                restore_training(ready, checkpoint)
                exact = checkpoint.get("treadle", {})
            ready.dispatch.refresh("fit")
            loop = fitting.make_loop(ready, exact)
            if checkpoint is not None and exact.get("should_stop", False):
                confirmed = [callback.confirm_stop() for callback in trainer.callbacks]
                trainer.should_stop |= loop.stop_is_pending() or True in confirmed
            del checkpoint, exact  # the fitting drops what it has put back
            try:
                loop.run()
                self._fits.end(fitting.left(ready, interrupted=False))
            except SIGTERMException as end:
                self._save_preempted(end)
                raise
            except BaseException:
                with suppress(Exception):  # the error that ended the fit is the one to report
                    self._fits.end(fitting.left(ready, interrupted=True))
                raise

    @during_a_save
    def save(self, path: PathLike, *, weights_only: bool, storage_options: Any = None) -> None:
        """Write a checkpoint; every rank calls it."""
        assert self.run is not None
        self.run.timed(self._save, "save_checkpoint")(path, weights_only, storage_options)

    def _save(self, path: PathLike, weights_only: bool, storage_options: Any) -> None:
        checkpoint, run = self._dump(weights_only)
        self._fabric.strategy.save_checkpoint(path, checkpoint, storage_options, keeping=keeping(run))

    def dump(self, *, weights_only: bool) -> dict[str, Any]:
        """Return what a checkpoint would be now, unwritten; every rank calls it."""
        return self._dump(weights_only)[0]

    def _dump(self, weights_only: bool) -> tuple[dict[str, Any], ReadyRun]:
        run, callbacks = self.trained, self._trainer.callbacks
        run = run if isinstance(run, ReadyRun) and not weights_only else self.run  # of a fit that failed before
        assert isinstance(run, ReadyRun)
        fitting = self.fitting if self.fitting is not None and self.fitting.run is run and not weights_only else None
        if self.run is not None and self.run is not run:
            run.changes.modes_before = self.run.changes.modes_before  # a hook of an evaluation saves
        run = run if fitting is None else fitting.as_saved(run)
        checkpoint = dump_checkpoint(run, callbacks, weights_only=weights_only)
        if fitting is not None:
            checkpoint["treadle"] |= {**fitting.saved_state(run), "should_stop": self._trainer.should_stop}
            checkpoint["treadle"] |= {"cluster_job": dict(self._job)} if self._job["name"] else {}
        return checkpoint, run

    def _save_preempted(self, end: SIGTERMException) -> None:
        """Save what a run that was asked to end goes on from; where the job is to be queued again, ``end`` has it."""
        trainer, strategy, job = self._trainer, self._fabric.strategy, str(self._job["name"])
        root = self._settings.default_root_dir

        def is_to_requeue() -> bool:  # a handler of the program's own sees to it
            return end.announced and bool(job) and not self._signals.answered

        requeues = on_rank_zero(strategy, is_to_requeue, "could not say whether the job is queued again")
        if not requeues and (not self._settings.enable_checkpointing or self._settings.fast_dev_run):
            return
        find_place = partial(claim_requeue_path if requeues else partial(preempted_path, trainer.callbacks), root)
        with tolerated(trainer, always=True):
            path = on_rank_zero(strategy, find_place, "found no place for a checkpoint")
            try:
                trainer.save_checkpoint(path)
                strategy.wait_for_saves(f"could not write {path}")
            finally:
                if requeues and self._fabric.is_global_zero:
                    release_requeue_path(path)
            end.job = job if requeues else ""
            rank_zero_info(
                f"The end of SLURM job {job} was announced: saved {path}."
                if requeues
                else f"Asked to terminate: saved {path}. ckpt_path='last' goes on from there."
            )
        if requeues and not end.job:
            rank_zero_warn(
                f"SLURM job {job} is not queued again, because the checkpoint that it would go on from could not be "
                f"written. To run it again all the same: `scontrol requeue {job}`."
            )

    def evaluate(
        self,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        fn: TrainerFn,
        dataloaders: Any,
        source: Source,
        verbose: bool,
    ) -> list[dict[str, float]]:
        """Validate or test; returns, for every loader, the logged names and values."""
        validating = fn is TrainerFn.VALIDATING
        stage, name = ("val", "validation") if validating else ("test", "test")
        found: list[dict[str, float]] = []
        session = self._open(fn, module, datamodule)
        with session.guarded(self._trainer), self._started(session, source) as run:
            ready = self._prepare(session, run, source)[0]
            self._given = dataloaders
            data = session.add_evaluation(ready, stage, dataloaders, self._settings)
            evaluation = Evaluation(ready, data, name, inference_mode=self._settings.inference_mode)
            found = [to_floats(metrics) for metrics in evaluation() or []]
        if verbose and self._fabric.is_global_zero:
            print_results(found, fn.value)
        return found

    def predict(
        self,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        dataloaders: Any,
        source: Source,
        keep: bool,
    ) -> list[Any] | None:
        """Predict; returns the predictions, None where they are not kept."""
        predictions: list[Any] | None = None
        session = self._open(TrainerFn.PREDICTING, module, datamodule)
        with session.guarded(self._trainer), self._started(session, source) as run:
            predictions = self._prediction(session, run, dataloaders, source, keep=keep)()
        if predictions and all(each is None for each in predictions):
            rank_zero_warn(
                "predict returned None for every batch: return the predictions from `predict_step`, or set"
                " return_predictions=False."
            )
        return predictions

    def stream(
        self, module: LightningModule, datamodule: LightningDataModule | None, dataloaders: Any, source: Source
    ) -> Iterator[Any]:
        """Predict one batch at a time; the first item is None, and comes when all is set up."""
        session = self._open(TrainerFn.PREDICTING, module, datamodule)
        with session.guarded(self._trainer), self._started(session, source) as run:
            prediction = self._prediction(session, run, dataloaders, source, keep=True)
            with suppress(GeneratorExit):  # the caller has enough predictions, which is no failure
                yield None
                yield from prediction.stream()

    # Searches, and their trials

    def launch_search(self, function: Callable[[Trials], T], module: LightningModule, *args: Any) -> T:
        """Run :meth:`search` in every process; returns what it returned on rank 0 where the strategy starts them."""
        if not self._fabric.strategy.launches_function:
            self._fabric.launch()
            return self.search(function, module, *args)
        found: T = self._fabric.launch(partial(_search_in_process, self, function), module._runs, *args)
        return found

    def search(
        self,
        function: Callable[[Trials], T],
        module: LightningModule,
        datamodule: LightningDataModule | None,
        fn: TrainerFn,
        loaders: Any,
    ) -> T:
        """Set up as a stage does, run a search in the place of its batches, and put everything back."""
        trainer, session = self._trainer, self._open(fn, module, datamodule)
        snapshot = Snapshot(module, data=[datamodule, loaders])
        with undone(self._fabric, snapshot), session.guarded(trainer, raises_interrupt=True):
            with self._started(session, (None, None), alone=True) as run:
                if fn is TrainerFn.FITTING:
                    self.fitting = Fitting(
                        session, run, self._settings, loaders, None, controls=trainer, signals=self._signals
                    )
                ready = self._prepare(session, run, (None, None))[0]
                if fn is TrainerFn.FITTING:
                    assembly.set_up_optimizers(ready)
                    ready.dispatch.call("on_fit_start")
                found = function(Trials(trainer, self, self._settings, loaders, keeps_values=False))
        if self._fabric.world_size > 1 or self._fabric.device.type != "cpu":
            self.session = self.fitting = None
            garbage_collection_cuda()  # the engine of the search, and its buffers
        return found

    def search_within(self, function: Callable[[Trials], T]) -> T:
        """Run a search inside of the stage that runs, with its module, engine and optimizers."""
        return function(Trials(self._trainer, self, self._settings, self._given_for("train"), keeps_values=True))

    def _given_for(self, stage: str) -> Any:
        """The loaders that the user passed for a stage of the running fit, or for the running evaluation."""
        if self.state.fn is TrainerFn.FITTING and self.fitting is not None:
            return self.fitting.given.get(stage)
        return self._given

    def source(self, stage: str) -> Any:
        """What gives the loaders of "train", "val", "test" or "predict": the user's own, a data module, the module."""
        given, session = self._given_for(stage), self.session
        return given if given is not None or session is None else gives_loaders(session.module, session.datamodule)

    def renew(self, *, loaders: bool) -> bool:
        """Make anew what depends on an attribute that has changed: before the first batch of a fit its optimizers.

        Args:
            loaders: Whether the loaders of the running stage depend on it, too.

        Returns:
            Whether the optimizers were made anew.
        """
        run, fitting = self.run, self.fitting
        assert isinstance(run, ReadyRun)
        if self.state.fn is TrainerFn.FITTING and fitting is not None:
            if loaders:
                fitting.renew_loaders()
            if fitting.loop is None and run.optimizers and not self._fabric.strategy.sets_up_jointly:
                run.optimizers.clear()
                run.schedulers.clear()
                assembly.set_up_optimizers(run)
                return True
        elif loaders:
            for stage, data in self.session.evaluations.items() if self.session is not None else ():
                name = f"{stage}_dataloader"
                data.renew(run.dispatch.run(name, find_loaders, None, name, run.module, run.datamodule))
        return False

    def replace_optimizers(self, optimizers: Sequence[Any]) -> None:
        """Let a fit go on with other optimizers.

        Raises:
            MisconfigurationException: no fit has made its optimizers, or the strategy's engine has them.
        """
        run = self.trained
        if not isinstance(run, ReadyRun) or self.fitting is None or self._fabric.strategy.sets_up_jointly:
            raise MisconfigurationException(
                "trainer.optimizers can be set in a fit, in `on_fit_start` or later, and not under a strategy whose"
                " engine has the optimizers: return them from `configure_optimizers`."
            )
        assembly.replace_optimizers(run, optimizers)
        self._settings.changes += 1  # so that the loop is made anew before the next epoch

    def _begin_trial(self, other: ReadyRun, *, alone: bool = False) -> ReadyRun:
        """Begin to run batches with what another run has set up, with counters, metrics and listeners of its own."""
        trainer = self._trainer
        fn = other.state.fn
        self.state = TrainerState(TrainerStatus.RUNNING, fn, None if fn is None else fn.stage)
        self.progress = progress = replace(other.progress)
        progress.begin_epoch()
        self.session = session = Session(self._fabric, other.module, other.datamodule, self.state)
        results = session.attach(trainer)
        dispatch = Dispatch(trainer, other.module, trainer.callbacks, results)
        run = Run(
            self._fabric, other.module, other.datamodule, dispatch, self.state, session.metrics, results, [], progress,
            list(other.modules), told=other.told,
        )  # fmt: skip
        session.run = ready = assembly.take_over(run, other, self._settings, alone=alone)
        return ready

    def train_trial(self, other: ReadyRun, loaders: Any, bounds: Controls, signals: Signals, *, alone: bool) -> None:
        """Train with the module, engine and optimizers of another run, until a callback raises what ends the trial.

        Args:
            other: The other run.
            loaders: The training batches.
            bounds: Of the trial.
            signals: Of the other run.
            alone: Whether ranks must not wait for each other in a step.
        """
        run = self._begin_trial(other, alone=alone)
        assert self.session is not None
        self.fitting = Fitting(self.session, run, self._settings, loaders, None, controls=bounds, signals=signals)
        self.fitting.make_loop(run, {}).run()
        if run.progress.batches == other.progress.batches:
            raise MisconfigurationException(
                "A search needs training batches, and there are none: the loader is empty, or limit_train_batches is 0."
            )

    def end_trial(self) -> None:
        """Call the hook that ends what the hook before the first batch has begun."""
        run = self.run
        assert run is not None
        run.dispatch.call("on_train_end")

    def evaluate_trial(self, other: ReadyRun, loaders: Any) -> None:
        """Validate, test or predict with the module and engine of another run, on the batches that the limits allow."""
        run, fn = self._begin_trial(other), self.state.fn
        assert self.session is not None and fn is not None
        data = self.session.add_evaluation(run, LOADERS[fn], loaders, self._settings)
        inference = self._settings.inference_mode
        if fn is TrainerFn.PREDICTING:
            Prediction(run, data, inference_mode=inference, keep=False)()
        else:
            validating = fn is TrainerFn.VALIDATING
            Evaluation(run, data, "validation" if validating else "test", inference_mode=inference)()

    def _prediction(self, session: Session, run: Run, dataloaders: Any, source: Source, *, keep: bool) -> Prediction:
        ready = self._prepare(session, run, source)[0]
        self._given = dataloaders
        data = session.add_evaluation(ready, "predict", dataloaders, self._settings)
        return Prediction(ready, data, inference_mode=self._settings.inference_mode, keep=keep)


def _search_in_process(runner: Runner, function: Callable[[Trials], T], fabric: Fabric, model: Any, *args: Any) -> T:
    """Run a search in a process that the strategy has started."""
    module: Any = user_module(model)
    module._run_as(model)  # sent here, a module has forgotten its compiled form
    return runner.search(function, module, *args)
