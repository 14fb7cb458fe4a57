"""One training epoch: batches, schedulers, logging, validation where due."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, Protocol

from treadle.data.lookahead import BatchIterator
from treadle.data.training import TrainingData
from treadle.data.transfer import stay
from treadle.loops.optimizers import step_schedulers
from treadle.loops.schedule import ValidationSchedule, window_size
from treadle.loops.step.automatic import AutomaticStep
from treadle.loops.step.manual import ManualStep
from treadle.module import LightningModule
from treadle.module.overriding import overrides
from treadle.run.progress import Phase
from treadle.run.run import ReadyRun
from treadle.run.signals import Signals
from treadle_fabric import StopAgreement, rank_zero_warn

__all__ = ["Controls", "TrainingEpoch"]

_BETWEEN: Final = 2**32  # boundaries from one training batch to the next: room for those of a validation


class Controls(Protocol):
    """What the user and callbacks may change while training."""

    should_stop: bool
    accumulate_grad_batches: int


class TrainingEpoch:
    """Runs epochs; everything that does not change between batches is decided here, once."""

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
        max_steps: int,
        log_every_n_steps: int,
        signals: Signals,
        agreement: StopAgreement | None,
    ) -> None:

        self._run, self._data, self._step, self._controls = run, data, step, controls
        self._schedule, self._validate, self._elapsed, self._may_stop = schedule, validate, elapsed, may_stop
        self._max_steps, self._log_every = max_steps, log_every_n_steps
        self._signals, self._agreement = signals, agreement
        self._on_batch_start = run.dispatch.listeners("on_train_batch_start")
        self._on_batch_end = run.dispatch.listeners("on_train_batch_end")
        self._automatic = run.module.automatic_optimization
        self._schedulers = run.schedulers if self._automatic else []
        own = overrides(run.module, "lr_scheduler_step", LightningModule)
        self._step_scheduler = self._scheduler_hook if own else run.module.lr_scheduler_step
        self._told_idle = False
        if step.wants_iterator:
            data.epochs.look_ahead()

    @property
    def val_check_batch(self) -> float:
        """The batches between two validations; infinity where it goes by epochs or time, or never runs."""
        return self._schedule.every_n_batches if self._schedule is not None else math.inf

    def run(self) -> None:
        """Train for one epoch, from where the progress stands."""
        run, progress, results = self._run, self._run.progress, self._run.results
        step, transfer, begin_batch = self._step, run.transfer, results.begin_batch
        accumulate = self._controls.accumulate_grad_batches if self._automatic else 1
        step.begin_epoch(accumulate)
        take_step, accumulate_only = step.step, step.accumulate
        if self._data.has_ended(progress.batch):  # with the batches of another number of processes
            self._end_resumed()
        if progress.phase is not Phase.BETWEEN:  # resumed in the end of a batch
            stop = self._finish_batch()
            if stop or progress.is_last_batch:
                self._data.epochs.finish(progress.epoch, progress.batch, drain=not stop)
                return
        batches: Any = self._data.iterate(progress.epoch, skip=progress.batch)
        total = self._data.stop
        if step.wants_iterator:
            batches = BatchIterator(batches, transfer).steps()
            transfer = stay
        on_batch_start, on_batch_end, schedulers = self._on_batch_start, self._on_batch_end, self._schedulers
        schedule, begun = self._schedule, progress.batch
        progress.begun = True
        for batch_idx, batch, is_last in batches:
            progress.is_last_batch = is_last
            batch = transfer(batch, 0)
            begin_batch(batch)
            if on_batch_start:
                results.hook = "on_train_batch_start"
                if -1 in [listener(batch, batch_idx) for listener in on_batch_start]:
                    self._step_schedulers("epoch", progress.epoch + 1, plateau=False)  # it is over all the same
                    break
            stepping = is_last or accumulate == 1 or (batch_idx + 1) % accumulate == 0
            window = 1 if accumulate == 1 else window_size(batch_idx, total, accumulate)
            before = progress.optimizer_steps
            outputs = (take_step if stepping else accumulate_only)(batch, batch_idx, window)
            progress.batch = batch_idx + 1
            progress.batches += 1
            progress.stepping, progress.stepped = stepping, (stepped := progress.optimizer_steps != before)
            if stepped:
                progress.step += 1
                progress.step_in_epoch += 1
            if schedulers and stepping:
                if stepped:
                    self._step_schedulers("step", progress.step, plateau=False)
                if is_last:
                    self._step_schedulers("epoch", progress.epoch + 1, plateau=False)
            if schedule is not None:
                progress.validation_due = self._is_due(schedule, is_last)
            if stepping:
                progress.logging_step += 1
            progress.phase = Phase.BATCH_END
            if on_batch_end:
                results.hook = "on_train_batch_end"
                for listener in on_batch_end:
                    listener(outputs, batch, batch_idx)
                if progress.optimizer_steps != before and not stepped:  # stepped by hand in the hook
                    progress.step += 1
                    progress.step_in_epoch += 1
            results.hook = ""
            if self._finish_batch():
                break
        begin_batch(None)
        if step.idle:
            self._tell_of_idleness(progress.batch - begun)

    def _end_resumed(self) -> None:
        """What follows the last batch of an epoch, where the one that was resumed turns out to be over."""
        progress = self._run.progress
        progress.is_last_batch, progress.phase = True, Phase.BATCH_END
        progress.stepping = progress.stepped = False
        if self._schedulers:
            self._step_schedulers("epoch", progress.epoch + 1, plateau=False)
        if self._schedule is not None:
            progress.validation_due = self._is_due(self._schedule, True)

    def _tell_of_idleness(self, batches: int) -> None:
        if self._step.idle == batches and not self._told_idle:
            self._told_idle = True
            where = " on rank 0" if self._run.fabric.world_size > 1 else ""  # each rank counts its own
            rank_zero_warn(
                f"`training_step` had no loss for any of the {batches} batches of epoch"
                f" {self._run.progress.epoch}{where}, so that nothing was learned from them: return the loss."
            )

    def _finish_batch(self) -> bool:
        """What follows ``on_train_batch_end``, from wherever the progress stands; returns whether to stop."""
        run, progress, schedule = self._run, self._run.progress, self._schedule
        if progress.stepping and progress.phase is Phase.BATCH_END and progress.logging_step % self._log_every == 0:
            if run.loggers:
                run.write(run.results.take_step_metrics(), progress.logging_step - 1)
        stop, terminated = self._stops_here()
        if schedule is not None and progress.phase is not Phase.VALIDATED:
            progress.phase = Phase.LOGGED
            if progress.validation_due or (stop and schedule.in_epoch(progress.epoch)):
                if not self._run_validation():
                    self._signals.raise_received(together=True)
                stop = self.agree_to_stop() and self._may_stop()
        if terminated:  # the run that goes on does the rest of this batch, and ends where this one would have
            progress.phase = max(progress.phase, Phase.LOGGED)
            self._signals.raise_received(together=True)
        if self._schedulers and progress.stepped:
            self._step_schedulers("step", progress.step, plateau=True)
        progress.phase = Phase.BETWEEN
        progress.validation_due = False
        return stop or progress.step == self._max_steps

    def _stops_here(self) -> tuple[bool, bool]:
        """Whether to stop, and whether because of a signal; with several ranks the same answer after the same batch."""
        stop = self._controls.should_stop and self._may_stop()
        if self._agreement is None:
            return stop, bool(self._signals.received)
        wish = "signal" if self._signals.received else "stop" if stop else ""
        reason = self._agreement.at_boundary(self._run.progress.batches * _BETWEEN, wish)
        if reason == "stop":
            self._controls.should_stop = True
        return reason == "stop", reason == "signal"

    def agree_to_stop(self) -> bool:
        """``should_stop`` where any rank set it, at a place that all ranks come to."""
        if self._agreement is not None:
            strategy = self._run.fabric.strategy
            self._controls.should_stop = strategy.reduce_boolean_decision(self._controls.should_stop, all=False)
        return self._controls.should_stop

    def close(self) -> None:
        """Let go of the loader's workers; the loop is used no more."""
        self._data.epochs.close()

    def end(self) -> None:
        """After the epoch's end hooks: plateau schedulers that monitor an epoch value."""
        if self._schedulers:
            self._step_schedulers("epoch", self._run.progress.epoch + 1, plateau=True)

    def _is_due(self, schedule: ValidationSchedule, is_last: bool) -> bool:
        progress = self._run.progress
        if schedule.every is not None:
            return schedule.in_epoch(progress.epoch) and self._elapsed(schedule.every)
        return schedule.due(progress.epoch, progress.batch, progress.batches, is_last=is_last)

    def _terminated(self, batch: int) -> bool:
        """Whether to end before this batch of a validation, on all ranks alike, because one was asked to terminate."""
        if self._agreement is None:
            return bool(self._signals.received)
        wish = "signal" if self._signals.received else ""
        return self._agreement.at_boundary(self._run.progress.batches * _BETWEEN + batch + 1, wish) == "signal"

    def _run_validation(self) -> bool:
        """Whether it came to its end."""
        progress = self._run.progress
        accumulate = self._controls.accumulate_grad_batches if self._automatic else 1
        if progress.is_last_batch or progress.batch % accumulate == 0:
            self._run.dispatch.call("on_validation_model_zero_grad")
        return self._validate(self._terminated)

    def _step_schedulers(self, interval: str, count: int, *, plateau: bool) -> None:
        progress = self._run.progress
        metrics = self._run.metrics
        stepped = step_schedulers(
            self._schedulers,
            interval=interval,
            count=count,
            plateau=plateau,
            step=self._step_scheduler,
            metrics=lambda: metrics.callback,
        )
        progress.scheduler_steps += stepped
        progress.scheduler_steps_in_epoch += stepped

    def _scheduler_hook(self, scheduler: Any, metric: Any) -> None:
        self._run.dispatch.run("lr_scheduler_step", self._run.module.lr_scheduler_step, scheduler, metric)
