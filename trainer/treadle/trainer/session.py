"""One call of fit, validate, test or predict, from its first hook to its last."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from treadle.callbacks.checkpoint import tolerated
from treadle.data.evaluation import EvaluationData
from treadle.data.find import find_loaders
from treadle.loops.inference import replace_inference_tensors
from treadle.metrics.bus import Results
from treadle.metrics.latest import Metrics
from treadle.module import LightningDataModule, LightningModule
from treadle.module.overriding import takes_names
from treadle.profilers import Profiler
from treadle.run.dispatch import Dispatch
from treadle.run.progress import FitProgress
from treadle.run.run import ReadyRun, Run
from treadle.run.signals import Signals, SIGTERMException, claim_together, meet
from treadle.stages import TrainerFn, TrainerState, TrainerStatus
from treadle.trainer import assembly, preflight
from treadle.trainer.settings import Settings
from treadle_fabric import Fabric, RequeueError, claim_failure, rank_zero_info, rank_zero_warn
from treadle_fabric.coordination import patient_barrier
from treadle_fabric.environments import requeue
from treadle_fabric.launchers import in_notebook

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = ["Session"]


class Session:
    """One call of fit, validate, test or predict: what surrounds its batches, and what the trainer shows of it.

    What happens when::

        with session.guarded(trainer), session.flagged(settings, signals):
            session.attach: module and data module get the trainer, and self.log goes to this session
            configure_callbacks                                        # Trainer._started
            session.start: prepare_data, all ranks meet, setup, configure_model
            the stage: checkpoint, set-up of the module, loaders, batches
            session.finish: all ranks meet, on_fit_end, teardown, loggers and checkpoint IO are closed
        an error:    the other ranks learn of it; on_exception; loggers are closed as failed
        in any case: the last metrics can still be read, and the module logs nowhere any more

    Args:
        fabric: The runtime.
        module: The module that runs.
        datamodule: The data module, or None.
        state: What the user asked for, and how the run goes.
        metrics: What was logged. Default: nothing yet.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        state: TrainerState,
        metrics: Metrics | None = None,
    ) -> None:
        self._fabric = fabric
        self.module, self.datamodule, self.state = module, datamodule, state
        self.metrics = Metrics() if metrics is None else metrics
        self.run: Run | None = None
        """The run; a :class:`ReadyRun` once the module is set up."""
        self.evaluations: dict[str, EvaluationData] = {}
        """The loaders of "val", "test" and "predict"."""
        self.ckpt_path: str | None = None
        """The checkpoint that the session starts from; a fit knows it before the first hook, if it is there then."""
        self.searched: list[Any] = []
        """The folders of the callbacks when a checkpoint was looked for before the first hook."""
        self.log_dir: str | None = None
        self._undo: list[Callable[[], Any]] = []  # called at the end in any case
        self.terminated = False
        """Whether a signal ended the session."""
        self._signals: Signals | None = None  # those that end the session, while they do
        self._profiler: Profiler | None = None  # while it measures

    def __getstate__(self) -> dict[str, Any]:
        """What the trainer still shows of a session in a copy: not the run, its loaders and its optimizers."""
        ended = dict.fromkeys(("run", "_signals", "_profiler"))
        return {**self.__dict__, "metrics": self.metrics.detached(), "evaluations": {}, "_undo": [], **ended}

    @contextmanager
    def flagged(self, settings: Settings, signals: Signals) -> Generator[None]:
        """While entered, set torch's global flags as the settings say and, in fit, heed the signals that end it."""
        with ExitStack() as stack:
            stack.enter_context(preflight.backend_flags(settings))
            if self.state.fn is TrainerFn.FITTING:
                self._signals = stack.enter_context(signals)
            if settings.detect_anomaly:
                stack.enter_context(torch.autograd.set_detect_anomaly(True))
            yield

    def attach(self, trainer: Trainer) -> Results:
        """Give module and data module the trainer; return the slots that ``self.log`` goes to from now on."""
        results = Results(training=self.state.fn is TrainerFn.FITTING, fabric=self._fabric)
        results.belongs_to(self.module, trainer.callbacks)
        if self.datamodule is not None:
            self.datamodule.trainer = trainer
        self.module.attach(trainer, results)
        self.metrics.active = results
        return results

    def start(self, trainer: Trainer, results: Results, progress: FitProgress, settings: Settings) -> Run:
        """Call the hooks that come before the module is set up: prepare_data, setup, configure_model."""
        module, fn = self.module, self.state.fn
        assert fn is not None
        self.log_dir = self._fabric.broadcast(trainer.log_dir)
        profiler = self._begin_profiling(trainer.profiler)
        dispatch = Dispatch(trainer, module, trainer.callbacks, results, profiler)
        self.run = run = Run(
            self._fabric, module, self.datamodule, dispatch, self.state, self.metrics, results, trainer.loggers,
            progress, [m for m in module.modules() if isinstance(m, LightningModule)], profiler=profiler,
        )  # fmt: skip
        for owner in [o for o in (self.datamodule, module) if o is not None]:
            per_node = getattr(owner, "prepare_data_per_node", True)
            if (self._fabric.local_rank if per_node else self._fabric.global_rank) == 0:
                dispatch.run("prepare_data", owner.prepare_data)
        patient_barrier("prepare_data")
        if self.datamodule is not None:
            self._run_stage_hook(dispatch, "setup", fn.value)
        dispatch.call("setup", fn.value)
        with self._fabric.init_module():
            dispatch.run("configure_model", module.configure_model)
        dispatch.refresh(fn.value)
        run.changes.begin(module)
        run.modules[:] = [m for m in module.modules() if isinstance(m, LightningModule)]
        module.attach(trainer, results)  # those that were made just now, too
        if settings.layer_sync is not None and self._fabric.world_size > 1:
            assembly.sync_layers(module, settings.layer_sync, self._fabric.accelerator)
            self._undo.append(partial(settings.layer_sync.revert, module))
        return run

    def _run_stage_hook(self, dispatch: Dispatch, name: str, stage: str) -> None:
        """Call ``setup`` or ``teardown`` of the data module."""
        method = getattr(self.datamodule, name)
        named = takes_names(method, 0, "stage")
        dispatch.run(name, method, *(() if named else (stage,)), **({"stage": stage} if named else {}))

    def _begin_profiling(self, profiler: Profiler) -> Profiler | None:
        """Begin to measure; returns the profiler, None where it measures nothing."""
        if not profiler.records:
            return None
        fabric, fn = self._fabric, self.state.fn
        assert fn is not None
        profiler.watch(self.module)
        profiler.setup(fn.value, fabric.local_rank if fabric.world_size > 1 else None, self.log_dir)
        self._profiler = profiler
        return profiler

    def _end_profiling(self) -> None:
        """Report what was measured. A report that fails does not fail the run, nor hide the error that ended it."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        assert self.state.fn is not None
        for end in (profiler.describe, partial(profiler.teardown, self.state.fn.value)):
            try:
                end()
            except Exception as error:
                rank_zero_warn(f"The report of {type(profiler).__name__} failed: {type(error).__name__}: {error}.")

    def add_evaluation(self, run: ReadyRun, stage: str, given: Any, settings: Settings) -> EvaluationData:
        """Find the loaders of "val", "test" or "predict": the given ones, else those of data module or module.

        With a limit of 0 nobody is asked for loaders.
        """
        run.maps.release()  # the weights are restored
        name, loaders = f"{stage}_dataloader", {}
        if given is not None or settings.limits[stage] != 0:
            loaders = run.dispatch.run(name, find_loaders, given, name, run.module, run.datamodule)
        data = self.evaluations[stage] = assembly.evaluation_data(run, settings, loaders, stage)
        return data

    def finish(self, trainer: Trainer, run: Run) -> None:
        """Call the last hooks of a run that came to its end, and close loggers and checkpoint IO."""
        fn = self.state.fn
        assert fn is not None
        if fn is not TrainerFn.PREDICTING:  # a caller may read a stream of predictions on one rank only to its end
            # Rank 0 hosts the store: where there was nothing to do, it could end while others connect to the store.
            self._fabric.barrier("end of the run")
        if fn is TrainerFn.FITTING:
            run.dispatch.call("on_fit_end")
        if run.datamodule is not None:
            self._run_stage_hook(run.dispatch, "teardown", fn.value)
        run.dispatch.call("teardown", fn.value)
        for logger in run.loggers:
            logger.finalize("success")
        with tolerated(trainer):
            self._fabric.strategy.checkpoint_io.teardown()  # waits for what is being written
        self.state.status = TrainerStatus.FINISHED

    @contextmanager
    def guarded(self, trainer: Trainer, *, raises_interrupt: bool = False) -> Generator[None]:
        """Report an error to other ranks, hooks and loggers, and detach the module in any case.

        Ctrl-C ends the run and the program, in a notebook the run only. What a user's handler of a signal raised is
        reported as an error is.

        Args:
            trainer: The trainer.
            raises_interrupt: Whether Ctrl-C is raised again, because the caller has nothing to return then.
        """
        strategy = self._fabric.strategy
        try:
            with self._explained():
                yield
        except BaseException as error:
            end = error if isinstance(error, SIGTERMException) else self._signals.end if self._signals else None
            self.terminated, together = end is not None, end is not None and end.together
            interrupted = isinstance(error, KeyboardInterrupt)
            if together:
                claim_together(error, strategy)
            elif not interrupted and (not self.terminated or self._fabric.is_global_zero):
                claim_failure(error)
            self._failed(error, trainer)
            if end is not None and together:
                meet(strategy)  # who started the ranks may end the others, which still write, after the first
                if end.job:
                    self._queue_again(end.job)
            if not interrupted or raises_interrupt:
                raise
            goes_on = in_notebook()  # where the program that goes on is a person
            self._tell_of_interrupt(goes_on)
            if not goes_on:
                raise SystemExit(1) from None
        finally:
            self._end_profiling()
            self.state.stage = None
            if self.metrics.active is not None:
                self.metrics.keep(self.metrics.active)
                self.metrics.active = None
            strategy.precision.teardown()
            while self._undo:
                self._undo.pop()()
            self.module.attach(trainer)
            if self.state.fn is not TrainerFn.FITTING:  # what was evaluated may be trained next
                replace_inference_tensors([self.module, self.datamodule, *trainer.callbacks, self.metrics])
            self._fabric.callbacks[:] = [c for c in self._fabric.callbacks if c is not self.module]

    @contextmanager
    def _explained(self) -> Generator[None]:
        """Raise a clearer error in the place of what the engine's tensors made torch raise in a hook."""
        try:
            yield
        except RuntimeError as error:
            engine = self.run.engine if isinstance(self.run, ReadyRun) else None
            explained = None if engine is None else self._fabric.strategy.explain_error(engine, error)
            if explained is None:
                raise
            raise explained from error

    def _queue_again(self, job: str) -> None:
        """Have the cluster stop the job and queue it again; all ranks have written everything."""
        if self._fabric.is_global_zero:
            try:
                requeue(job)
                rank_zero_info(f"SLURM job {job} is queued again, and goes on from there by itself.")
            except RequeueError as error:
                rank_zero_warn(f"{error}")
        meet(self._fabric.strategy)  # who started the ranks may end this one after the first

    def _tell_of_interrupt(self, goes_on: bool) -> None:
        alone = self._fabric.world_size == 1
        rank_zero_info(
            "Interrupted: the run has ended"
            + (", and its state is intact." if alone else ".")
            + (" `trainer.interrupted` is True." if goes_on else " The program ends with status 1.")
            + (
                ""
                if alone
                else " The ranks may be at different batches, so do not save now; SIGTERM saves, and ends all ranks"
                " after the same batch."
            )
        )

    def _failed(self, error: BaseException, trainer: Trainer) -> None:
        """Call on_exception everywhere, then close the loggers; a second error must not hide the first."""
        self.state.status = TrainerStatus.INTERRUPTED
        calls: list[Callable[[], Any]] = []
        if (run := self.run) is not None:
            told = list(run.dispatch.listeners("on_exception"))
            told += [run.datamodule.on_exception] if run.datamodule is not None else []
            calls += [partial(run.dispatch.run, "on_exception", listener, error) for listener in told]
        calls += [partial(logger.finalize, "failed") for logger in trainer.loggers]
        calls.append(self._fabric.strategy.checkpoint_io.teardown)
        for call in calls:
            try:
                call()
            except Exception as second:
                rank_zero_warn(f"{type(error).__name__} ended the run, and then came {second!r}.")
