"""Validation and test: one evaluation over all loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from treadle.data.evaluation import EvaluationData
from treadle.data.lookahead import BatchIterator
from treadle.data.transfer import stay
from treadle.loops.inference import explain_missing_gradients, outside_inference_mode
from treadle.loops.lockstep import lockstep_of
from treadle.loops.step.whole import evaluation_of_whole_batches
from treadle.metrics.bus import Results
from treadle.module.hooks import ModuleHooks
from treadle.module.modes import module_modes, restore_modes
from treadle.module.overriding import overrides
from treadle.module.steps.arguments import EVALUATION_ARGUMENTS, bind_step
from treadle.profilers.profiler import timed_iteration
from treadle.run.progress import Phase
from treadle.run.run import ReadyRun
from treadle.stages import RunningStage, TrainerFn
from treadle_fabric.data import BatchMeeting

__all__ = ["Evaluation"]


class Evaluation:
    """Runs ``validation_step`` or ``test_step`` over the loaders; which methods it calls is decided once.

    Args:
        run: the run that the evaluation belongs to.
        data: the loaders and the number of batches of each.
        name: "validation" or "test".
        inference_mode: whether to run under ``torch.inference_mode``, where the strategy allows it, rather than under
            ``torch.no_grad``.
    """

    def __init__(self, run: ReadyRun, data: EvaluationData, name: str, *, inference_mode: bool) -> None:
        self._run, self.data, self._name = run, data, name
        self._results = Results(training=False, fabric=run.fabric)
        self._results.belongs_to(run.module, run.results.callbacks)
        self._several = len(data.loaders) > 1
        if run.fabric.strategy.runs_whole_batch:
            self._step, self._wants_iterator = evaluation_of_whole_batches(run, self._results, name), False
        else:
            step, call = getattr(run.module, f"{name}_step"), run.method(f"{name}_step")
            self._step, self._wants_iterator = bind_step(step, call, EVALUATION_ARGUMENTS, several=self._several)
        inference_mode &= run.fabric.strategy.allows_inference_mode
        self._no_grad = torch.inference_mode if inference_mode else torch.no_grad
        self._iterate: Callable[..., Any] = data.iterate
        if inference_mode:
            self._iterate = lambda *args: outside_inference_mode(partial(data.iterate, *args))
        self._around = tuple(run.dispatch.listeners(f"on_{name}_batch_{when}") for when in ("start", "end"))
        self._meeting = BatchMeeting(name) if run.fabric.world_size > 1 else None
        self._lockstep = lockstep_of(run, f"{name}_step", self._no_grad)
        hooks = (f"on_{name}_model_eval", f"on_{name}_model_train")
        self._sets_modes = tuple(not overrides(run.module, hook, ModuleHooks) for hook in hooks)  # before and after

    def __call__(
        self,
        num_batches: list[float] | None = None,
        *,
        silent: bool = False,
        interrupted: Callable[[int], bool] | None = None,
    ) -> list[dict[str, Any]] | None:
        """Evaluate.

        Args:
            num_batches: the number of batches of each loader. Default: the limits of the data.
            silent: write nothing to the loggers, as in the sanity check. Default: False.
            interrupted: called before every batch with its number over all loaders; returns whether to end there.

        Returns:
            For every loader the logged names and values; None if the evaluation was interrupted.
        """
        run, name, dispatch, results = self._run, self._name, self._run.dispatch, self._results
        hook = f"on_{name}"
        before = run.log_to(results)
        run.changes.modes_before = modes = module_modes(run.module)
        try:
            with self._no_grad():
                dispatch.call(f"{hook}_model_eval")
                if self._sets_modes[0]:
                    run.module.eval()
                dispatch.call(f"{hook}_start")
                dispatch.call(f"{hook}_epoch_start")
                limits = self.data.num_batches if num_batches is None else num_batches  # hooks may renew the loaders
                interruption = None if interrupted is None else _Interruption(interrupted)
                if self._meeting is not None:
                    self._meeting.open()
                for loader_idx, limit in enumerate(limits):
                    if limit and (interruption is None or not interruption.came):
                        self._loader(loader_idx, limit, silent, interruption)
                    elif self._lockstep is not None:
                        self._lockstep.skip()
                    if self._meeting is not None:
                        self._meet(loader_idx, self._meeting)
                if self._meeting is not None:
                    results.forget_computed()
                if interruption is not None and run.fabric.strategy.reduce_boolean_decision(
                    interruption.came, all=False
                ):
                    return None
                logged, per_loader = run.metrics.close_epoch(results, loaders=len(limits))
                dispatch.call(f"{hook}_epoch_end")
                late, extra = run.metrics.close_epoch(results, loaders=len(limits))  # what was logged in that hook
                logged |= late
                per_loader = [{**mine, **more} for mine, more in zip(per_loader, extra, strict=True)]
                if not silent:
                    step = run.progress.logging_step
                    run.write(logged, max(step - 1, 0) if run.state.fn is TrainerFn.FITTING else step)
                results.reset()
                if run.state.stage is RunningStage.VALIDATING and run.progress.phase is Phase.LOGGED:
                    run.progress.phase = Phase.VALIDATED  # a checkpoint of the hook must not validate again
                dispatch.call(f"{hook}_end")
        except RuntimeError as error:
            if self._no_grad is torch.inference_mode:
                explain_missing_gradients(error, results.hook or f"{name}_step")
            raise
        finally:
            results.reset()
            run.log_to(before)
            run.changes.modes_before = []
            if self._sets_modes[1]:
                restore_modes(modes)
        if not self._sets_modes[1]:
            dispatch.call(f"{hook}_model_train")
        return per_loader

    def _meet(self, loader_idx: int, meeting: BatchMeeting) -> None:
        """Wait for ranks that have more batches: a collective in one of them must not be taken for a later one."""
        if not meeting.begun:
            self._results.idle.add(loader_idx if self._several else None)
        meeting.come(f"of loader {loader_idx}" if self._several else "")

    def forget(self) -> None:
        """Forget what was logged, because another number of loaders follows: their names are others."""
        self._run.metrics.forget(self._results)

    def _loader(self, loader_idx: int, limit: float, silent: bool, interruption: _Interruption | None) -> None:
        """Evaluate on one loader."""
        run, results, step = self._run, self._results, self._step
        transfer, begin_batch, loggers = run.transfer, results.begin_batch, bool(run.loggers) and not silent
        on_batch_start, on_batch_end = self._around
        step_name, start_name, end_name = (
            f"{self._name}_step",
            f"on_{self._name}_batch_start",
            f"on_{self._name}_batch_end",
        )
        results.dataloader_idx = loader_idx if self._several else None
        action = f"[_EvaluationLoop].{'test' if self._name == 'test' else 'val'}_next"
        batches: Any = timed_iteration(run.profiler, action, self._iterate(loader_idx, run.progress.epoch, limit))
        batch_idx = -1
        if self._wants_iterator:
            batches, transfer = BatchIterator(batches, transfer, loader_idx).steps(), stay
        if interruption is not None:
            batches = interruption.before(batches)
        if self._lockstep is not None:
            batches = self._lockstep.turns(batches)
        meeting = self._meeting
        for batch_idx, batch, _ in batches:
            if meeting is not None:
                meeting.begun = batch_idx + 1
            batch = transfer(batch, loader_idx)
            begin_batch(batch)
            if on_batch_start:
                results.hook = start_name
                for listener in on_batch_start:
                    listener(batch, batch_idx, loader_idx)
            results.hook = step_name
            output = step(batch, batch_idx, loader_idx)
            if on_batch_end:
                results.hook = end_name
                for listener in on_batch_end:
                    listener(output, batch, batch_idx, loader_idx)
            if loggers:
                metrics = results.take_step_metrics()
                if metrics:
                    run.write(metrics, run.validated.get(loader_idx, 0) + batch_idx, with_epoch=False)
        if not silent:
            run.validated[loader_idx] = run.validated.get(loader_idx, 0) + batch_idx + 1
        results.dataloader_idx = None
        results.hook = ""
        begin_batch(None)


class _Interruption:
    """Ends an evaluation between two batches.

    Args:
        interrupted: called before every batch with its number over all loaders; returns whether to end there.
    """

    def __init__(self, interrupted: Callable[[int], bool]) -> None:
        self._interrupted, self._asked = interrupted, 0
        self.came = False

    def before(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of a loader that come before the interruption."""
        for batch in batches:
            self.came = self._interrupted(self._asked)
            if self.came:
                return
            self._asked += 1
            yield batch
