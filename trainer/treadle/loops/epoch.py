"""One training epoch: batches, schedulers, logging, and validation where it is due."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, Final

from treadle.data.lookahead import BatchIterator
from treadle.data.training import TrainingData
from treadle.data.transfer import stay
from treadle.loops.schedule import ValidationSchedule
from treadle.loops.schedulers import Schedulers
from treadle.loops.step.automatic import AutomaticStep
from treadle.loops.step.manual import ManualStep
from treadle.loops.stopping import Controls, Stops
from treadle.module.hooks import ModuleHooks
from treadle.module.overriding import overrides
from treadle.profilers.profiler import timed_iteration
from treadle.run.accumulation import Accumulation
from treadle.run.progress import Phase
from treadle.run.run import ReadyRun
from treadle.run.signals import Signals
from treadle_fabric import MisconfigurationException, StopAgreement, isolate_rng, rank_zero_warn

__all__ = ["TrainingEpoch"]

_BATCH_END: Final = Phase.BATCH_END  # each look into an Enum costs as much as a function call
_BETWEEN: Final = Phase.BETWEEN


class TrainingEpoch:
    """Runs training epochs; what does not change between batches is decided in the constructor."""

    def __init__(
        self,
        run: ReadyRun,
        data: TrainingData,
        step: AutomaticStep | ManualStep,
        controls: Controls,
        *,
        schedule: ValidationSchedule | None,
        validate: Callable[[Callable[[int], bool]], bool],
        elapsed: Callable[[timedelta], bool],
        may_stop: Callable[[], bool],
        log_every_n_steps: int,
        signals: Signals,
        agreement: StopAgreement | None,
    ) -> None:
        self._run, self._data, self._step, self._controls = run, data, step, controls
        self._trains = tuple(run.timed(each, "run_training_batch") for each in (step.accumulate, step.step))
        self._schedule, self._validate, self._elapsed = schedule, validate, elapsed
        self._log_every, self._max_steps = log_every_n_steps or math.inf, math.inf  # 0: at no step
        self._stops = Stops(run, controls, signals, agreement, may_stop)
        self._on_batch_start = run.dispatch.listeners("on_train_batch_start")
        self._on_batch_end = run.dispatch.listeners("on_train_batch_end")
        self._automatic = run.module.automatic_optimization
        self._schedulers = Schedulers(run, validates=schedule is not None)
        if step.wants_iterator:
            data.epochs.look_ahead()

    @property
    def val_check_batch(self) -> float:
        """The number of batches between two validations; infinity where epochs or time decide, or nobody validates."""
        return self._schedule.every_n_batches if self._schedule is not None else math.inf

    def run(self) -> bool:
        """Train for one epoch, from the batch that the progress tells; returns whether a stop left batches of it."""
        run, progress, results, step = self._run, self._run.progress, self._run.results, self._step
        accumulation, stop = self._begin_accumulating(), False
        if self._ends_resumed():
            results.end_batches()
            return not progress.is_last_batch
        self._check_accumulation(self._data.num_batches)
        batches: Any = self._iterate()
        total, transfer, begun = self._data.stop, run.transfer, progress.batch
        divides, stepping, window, done = accumulation.divides, True, 1.0, 0.0
        if step.wants_iterator:
            batches = BatchIterator(batches, transfer).steps()
            transfer = stay
        begin_batch, (train, train_and_step) = results.begin_batch, self._trains
        on_batch_start, on_batch_end, finish_batch = self._on_batch_start, self._on_batch_end, self._finish_batch
        schedulers, configs, schedule = self._schedulers, self._schedulers.configs, self._schedule
        may_skip = overrides(run.module, "on_train_batch_start", ModuleHooks)  # whose reply comes after the callbacks'
        progress.stepped = False
        for batch_idx, batch, is_last in batches:
            progress.is_last_batch = is_last
            batch = transfer(batch, 0)
            begin_batch(batch)
            if on_batch_start and batch is not None:  # None is skipped
                results.hook = "on_train_batch_start"
                if [listener(batch, batch_idx) for listener in on_batch_start][-1] == -1 and may_skip:
                    schedulers.step("epoch", progress.epoch + 1)  # the epoch is over all the same
                    break
            if divides:
                done, window, stepping = accumulation.place(batch_idx, total)
                stepping = stepping or is_last
            outputs = (train_and_step if stepping else train)(batch, batch_idx, window, done)
            progress.batch = batch_idx + 1
            progress.batches += 1
            progress.stepping = stepping
            if configs and stepping:
                if progress.stepped:
                    schedulers.step("step", progress.step)
                if is_last:
                    schedulers.step("epoch", progress.epoch + 1)
            if schedule is not None:
                progress.validation_due = self._is_due(schedule, is_last)
            if stepping:
                progress.logging_step += 1
            progress.phase = _BATCH_END
            if on_batch_end:
                results.hook = "on_train_batch_end"
                for listener in on_batch_end:
                    listener(outputs, batch, batch_idx)
            results.hook = ""
            if stop := finish_batch():
                self._end_late(batches)
                break
        else:
            self._end_late()
        progress.stepped = False  # a step in a hook from here on is one between two batches
        results.end_batches()
        self._tell_of_idleness(progress.batch - begun)
        self._tell_of_waiting(accumulation.every)
        if progress.is_last_batch:
            self._check_accumulation(progress.batch)
        return stop and not progress.is_last_batch

    def bound_steps(self) -> None:
        """Take over ``max_steps``, which may be set while an epoch runs."""
        max_steps = self._controls.max_steps
        self._max_steps = math.inf if max_steps == -1 else max_steps

    def check_optimization(self) -> None:
        """Refuse another kind of optimization than when the run began."""
        if self._run.module.automatic_optimization is not self._automatic:
            raise MisconfigurationException(
                f"automatic_optimization became {not self._automatic} during the run, and the run began with"
                f" {self._automatic}: set it in `__init__`, and step by hand in all epochs or in none."
            )

    @property
    def _accumulate(self) -> int:
        return self._controls.accumulate_grad_batches if self._automatic else 1

    def _begin_accumulating(self) -> Accumulation:
        """Divide the batches of an epoch into accumulations; a resumed epoch may be divided already."""
        progress, accumulate = self._run.progress, self._accumulate
        self.bound_steps()
        self._step.begin_epoch(accumulate)
        if progress.accumulation.every != accumulate:
            progress.accumulation = Accumulation(accumulate, progress.batch)
        return progress.accumulation

    def _iterate(self) -> Any:
        """Begin to draw the batches of the epoch that are left."""
        progress, early = self._run.progress, bool(self._on_batch_start) or self._step.wants_iterator
        progress.begun, place = True, progress.accumulation.place
        steps = (lambda batch: place(batch, math.inf).ends) if progress.accumulation.every > 1 else None
        batches = self._data.iterate(progress.epoch, progress.batch, steps=steps, saves_early=early)
        return timed_iteration(self._run.profiler, "[_TrainingEpochLoop].train_dataloader_next", batches)

    def _may_be_over(self) -> bool:
        """Whether ``max_steps`` was reached where a stream may be over, and something is due then."""
        progress, schedule = self._run.progress, self._schedule
        if self._data.knows_last or progress.is_last_batch or progress.step < self._max_steps:
            return False
        if self._controls.should_stop:  # has validated already
            return False
        return bool(self._schedulers.configs) or (schedule is not None and schedule.due_at_end(progress.epoch))

    def _end_late(self, batches: Iterator[Any] | None = None) -> None:
        """Do what follows an epoch's last batch, where that was not known as the last: schedulers, then validation.

        Args:
            batches: What may be left of the epoch, if training stops before its end. Default: nothing is left.
        """
        progress, schedule = self._run.progress, self._schedule
        if batches is not None and not (self._may_be_over() and next(batches, None) is None):
            return
        if progress.is_last_batch or not progress.batch:
            return
        progress.is_last_batch, progress.stepping, progress.stepped = True, False, False
        self._end_accumulation()
        self._schedulers.step("epoch", progress.epoch + 1)
        if schedule is not None and schedule.due_at_end(progress.epoch):
            progress.phase, progress.validation_due = Phase.LOGGED, True
            if not self._run_validation():
                self._stops.terminate()
            self._stops.after_validation()
        progress.phase, progress.validation_due = _BETWEEN, False

    def _end_accumulation(self) -> None:
        """Step for the gradients of an accumulation to which no other batch comes."""
        progress = self._run.progress
        done, window, _ = progress.accumulation.place(progress.batch, self._data.stop)
        if done:
            self._step.finish(window, done)
            progress.logging_step += 1
            if progress.stepped:
                self._schedulers.step("step", progress.step)

    def _ends_resumed(self) -> bool:
        """Do what is left of the last batch of a resumed run; whether nothing else is left of the epoch."""
        progress = self._run.progress
        if self._data.has_ended(progress.batch):  # with the batches of another number of processes
            progress.is_last_batch, progress.phase = True, _BATCH_END
            progress.stepping = progress.stepped = False
            self._end_accumulation()
            self._schedulers.step("epoch", progress.epoch + 1)
            if self._schedule is not None:
                progress.validation_due = self._is_due(self._schedule, True)
        if progress.phase is _BETWEEN:
            return False
        stop = self._finish_batch()
        if stop and self._may_be_over():
            self._end_late(self._iterate())
        if not stop and not progress.is_last_batch:
            return False
        self._data.epochs.finish(progress.epoch, progress.batch, drain=not stop)
        return True

    def _tell_of_idleness(self, batches: int) -> None:
        if 0 < self._step.idle == batches and self._run.first_time("idle"):
            where = " on rank 0" if self._run.fabric.world_size > 1 else ""  # each rank counts its own
            rank_zero_warn(
                f"`training_step` returned `None`, or no loss, for all {batches} batches of epoch"
                f" {self._run.progress.epoch}{where}, so that nothing was learned from them: return the loss."
            )

    def _tell_of_waiting(self, every: int) -> None:
        if self._accumulate != every and self._run.first_time("other accumulation"):
            rank_zero_warn(
                f"accumulate_grad_batches was set to {self._accumulate} while epoch {self._run.progress.epoch} ran with"
                f" {every}, and holds from the next epoch on. Set it in `on_train_epoch_start` or earlier."
            )

    def _check_accumulation(self, batches: float) -> None:
        """Warn, once, of an accumulation that is longer than an epoch; ``batches``: those of an epoch."""
        if self._accumulate > batches and self._run.first_time("accumulation"):
            rank_zero_warn(
                f"accumulate_grad_batches={self._accumulate} is more than the {batches:g} batches of epoch"
                f" {self._run.progress.epoch}. Gradients are not accumulated from one epoch to the next: the optimizer"
                f" steps at the end of each epoch, after {batches:g} batches. Set accumulate_grad_batches to at most"
                f" {batches:g}, or use more batches an epoch."
            )

    def _check_manual_steps(self) -> None:
        """Warn, once, of a whole epoch of manual optimization in which no optimizer stepped."""
        run, progress = self._run, self._run.progress
        idle = progress.is_last_batch and not progress.step_in_epoch and bool(run.optimizers)
        if idle and not self._automatic and run.first_time("no step"):
            rank_zero_warn(
                f"No optimizer stepped in epoch {progress.epoch}, in {progress.batch} batches. With"
                " `automatic_optimization = False` the module makes the steps: call `self.manual_backward(loss)` and"
                " `self.optimizers().step()` in `training_step`, or leave `automatic_optimization` at True. Without"
                " steps, `global_step` does not grow, and `max_steps` and `every_n_train_steps` have no effect."
            )

    def _finish_batch(self) -> bool:
        """Do what follows ``on_train_batch_end`` and is not done yet; returns whether to stop."""
        run, progress, schedule = self._run, self._run.progress, self._schedule
        if progress.stepping and progress.logging_step % self._log_every == 0 and progress.phase is _BATCH_END:
            if run.loggers:
                run.write(run.results.take_step_metrics(), progress.logging_step - 1)
        stop, terminated = self._stops.after_batch()
        if schedule is not None and progress.phase is not Phase.VALIDATED:
            progress.phase = Phase.LOGGED
            if progress.validation_due or (stop and schedule.in_epoch(progress.epoch)):
                # a fit that goes on draws what one long fit draws
                with nullcontext() if progress.validation_due else isolate_rng():
                    completed = self._run_validation()
                if not completed:
                    self._stops.terminate()
                stop = self._stops.after_validation()
        if terminated:  # the resumed run does the rest of this batch, and ends where this run would have
            progress.phase = max(progress.phase, Phase.LOGGED)
            self._stops.terminate()
        if self._schedulers.configs and progress.stepped:
            self._schedulers.step("step", progress.step, plateau=True)
        progress.phase = _BETWEEN
        progress.validation_due = progress.stepped = False
        return stop or progress.step >= self._max_steps

    def agree_to_stop(self) -> bool:
        """Set ``should_stop`` where any rank did; every rank calls it."""
        return self._stops.agree()

    def close(self) -> None:
        """End the loader's workers; no epoch follows."""
        self._data.epochs.close()

    def end(self) -> None:
        """Step the plateau schedulers that monitor a value of the epoch; called after its end hooks."""
        self._check_manual_steps()
        self._schedulers.step("epoch", self._run.progress.epoch + 1, plateau=True)

    def _is_due(self, schedule: ValidationSchedule, is_last: bool) -> bool:
        progress = self._run.progress
        if schedule.every is not None:
            return schedule.in_epoch(progress.epoch) and self._elapsed(schedule.every)
        return schedule.due(progress.epoch, progress.batch, progress.batches, is_last=is_last)

    def _run_validation(self) -> bool:
        """Validate; returns whether the validation came to its end."""
        progress = self._run.progress
        if progress.is_last_batch or not progress.accumulation.place(progress.batch, self._data.stop).done:
            self._run.dispatch.call("on_validation_model_zero_grad")
        return self._validate(self._stops.before_validation_batch)
