"""Fit: the sanity check, then epochs until a limit is reached or a stop is asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch

from treadle.checkpoint.exact import moment
from treadle.checkpoint.loggers import logger_states
from treadle.loops.epoch import TrainingEpoch
from treadle.loops.evaluate import Evaluation
from treadle.loops.inference import explain_inference_tensor
from treadle.loops.optimizers import explained_steps
from treadle.loops.stopping import Controls
from treadle.module import LightningModule
from treadle.run.dispatch import MONITORS
from treadle.run.progress import Phase
from treadle.run.run import ReadyRun
from treadle.stages import RunningStage
from treadle_fabric import (
    MisconfigurationException,
    PossibleUserWarning,
    StopAgreement,
    isolate_rng,
    rank_zero_info,
    rank_zero_warn,
    with_plain_names,
)
from treadle_fabric.coordination import StepClock

__all__ = ["FitLoop"]


_MAY_SAVE = [
    *(f"on_validation_{at}" for at in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")),
    "on_exception",
]
"""The hooks in which a callback or a module may save while a validation runs."""
_NO_BATCHES = "No training batches"
_SHORT_S = 1.0


class Parts(Protocol):
    """Makes the parts of a fit loop when the loop needs them."""

    @property
    def validates(self) -> bool:
        """Whether fit validates. Known for certain once the validation was made."""

    @property
    def restoring(self) -> bool:
        """Whether the state of a checkpoint, or of the last fit, is still to be restored."""

    @property
    def outdated(self) -> bool:
        """Whether the training loader is to be made anew, because what it depends on has changed."""

    @property
    def changes(self) -> int:
        """How often a setting was changed."""

    def make_epoch(self, run: ReadyRun, loop: FitLoop, /) -> TrainingEpoch | None:
        """Make the epoch loop; None without batches. From the second call on, the training loader is a new one."""

    def first_validation(self, run: ReadyRun, /) -> tuple[Evaluation | None, list[float]]:
        """Make the validation if the sanity check or the first epoch needs it; also give the sanity check's batches."""

    def validation(self, run: ReadyRun, /) -> Evaluation | None:
        """Give the validation with the loaders that this epoch is to have; None where there are none."""

    def nothing_left(self, run: ReadyRun, /) -> None:
        """Have the loggers keep all that the run has logged, because nothing is trained again."""

    def stopped(self, run: ReadyRun, /) -> None:
        """Keep the state of a stop in the middle of an epoch, where a later fit goes on."""

    def remake(self, run: ReadyRun, loop: FitLoop, /) -> TrainingEpoch:
        """Make epoch loop and validation again, with the same loaders: listeners or settings have changed."""

    def restore(self, run: ReadyRun, /) -> None:
        """Restore, once, the state that a resumed run had at its checkpoint; the random state comes last."""


def _tell_of_evaluation_mode(module: LightningModule) -> None:
    """Submodules stay in the modes that the user gave them, which for a pretrained model may not be meant.

    What is frozen as well, with all that is in it, is meant to stay as it is.
    """
    frozen: tuple[str, ...] = ()
    names = []
    for name, child in with_plain_names(module, module.named_modules()):
        if child.training or name.startswith(frozen):
            continue
        parameters = [p.requires_grad for p in child.parameters()]
        if parameters and not any(parameters):
            frozen += (f"{name}." if name else "",)
        else:
            names.append(name or type(module).__qualname__)
    if names:
        rank_zero_warn(
            f"Found {len(names)} module(s) in eval mode at the start of training, which stay so, so that their dropout"
            f" and batch norm do not train: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. Call `train()`"
            " before fit if that is not meant.",
            category=PossibleUserWarning,
        )


class FitLoop:
    """Runs training epochs; see :mod:`treadle.module.hooks` for the order of everything.

    Args:
        run: the run.
        parts: makes the epoch loop and the validation when they are needed.
        controls: holds ``should_stop`` and the bounds of the run.
        reload_every: epochs after which the epoch loop is made anew; 0 for never.
    """

    def __init__(
        self,
        run: ReadyRun,
        parts: Parts,
        controls: Controls,
        *,
        reload_every: int,
    ) -> None:
        self._run, self._parts, self._controls, self._reload_every = run, parts, controls, reload_every
        self._clock, self._validated_at = StepClock(run.fabric), time.monotonic()
        self._told_min = False
        self._changes = parts.changes  # of settings, which the epoch loop knows
        self._changed = False  # other listeners than when the epoch loop was made
        self._validation_s = math.inf  # how long the last validation took
        self._may_save_in_validation = any(map(run.dispatch.listeners, _MAY_SAVE))
        self.began = False
        """Whether training has begun, after the sanity check."""
        self.epoch: TrainingEpoch | None = None
        self.agreement: StopAgreement | None = None
        """Lets several ranks stop after the same batch; None on one rank."""

    def run(self) -> None:
        """Run the sanity check, then the training epochs."""
        run = self._run
        try:
            if not self._done():
                self._sanity_check()
            run.state.stage, self.began = RunningStage.TRAINING, True
            self.agreement = StopAgreement() if run.fabric.world_size > 1 else None
            with run.steps.counting():
                self._train()
        except RuntimeError as error:
            if (clearer := explain_inference_tensor(error, run.module)) is not None:
                raise clearer from error
            raise
        finally:
            if self.epoch is not None:
                self.epoch.close()
            if self.agreement is not None:
                self.agreement.close()

    def _train(self) -> None:
        run, progress, dispatch = self._run, self._run.progress, self._run.dispatch
        reason = self._done()
        self.epoch = epoch = None if reason else self._parts.make_epoch(run, self)
        if epoch is None:
            self._parts.nothing_left(run)
            rank_zero_info(f"`Trainer.fit` stopped: {reason or _NO_BATCHES}.")
            if progress.batches and self._controls.should_stop:
                rank_zero_info(
                    "That was in the run that this fit goes on from. To train on, change what the callback that"
                    " stopped it decides by (its `patience`, say), leave it out, or raise `min_epochs` or `min_steps`."
                )
            elif progress.batches:
                rank_zero_warn(
                    "This fit goes on from the last one or from a checkpoint, and nothing is left to do: to train on,"
                    " raise `trainer.max_epochs` or `max_steps` before `fit`; to begin anew, make a new Trainer."
                )
            return
        _tell_of_evaluation_mode(run.module)
        self._validated_at, goes_on = time.monotonic(), progress.batches or self._parts.restoring
        with torch.enable_grad():
            with run.changes.repeated(run.optimizers if goes_on else ()):
                dispatch.call("on_train_start")
            first = True
            while not (reason := self._done()):
                if not first and self._reload_every and progress.epoch % self._reload_every == 0:
                    epoch.close()
                    self.epoch = renewed = self._parts.make_epoch(run, self)
                    if renewed is None:
                        reason = _NO_BATCHES
                        break
                    epoch = renewed
                first = False
                epoch = self._begin_epoch(epoch)
                with explained_steps(run.module):
                    stopped = run.timed(epoch.run, "run_training_epoch")()
                if stopped:
                    self._parts.stopped(run)
                self._changed = dispatch.refresh("fit")
                progress.epoch_ended = True
                self._end_epoch(epoch)
                progress.begin_epoch()
            dispatch.refresh("fit")
            dispatch.call("on_train_end")
        run.loss.report()
        rank_zero_info(f"`Trainer.fit` stopped: {reason}.")

    def _begin_epoch(self, epoch: TrainingEpoch) -> TrainingEpoch:
        """Call the hook, restore what a resumed run has to, and return the loop for what listens and is defined now."""
        run, dispatch = self._run, self._run.dispatch
        self._changed |= dispatch.refresh("fit")
        dispatch.tell_of_states()
        if run.progress.begun:  # the hook ran before the checkpoint was saved
            with run.changes.unchanged(run.optimizers):
                dispatch.call("on_train_epoch_start")
            self._parts.restore(run)
        else:
            self._parts.restore(run)
            dispatch.call("on_train_epoch_start")
        run.changes.tell_untrained(run.module, run.optimizers)
        epoch.check_optimization()
        if self._parts.outdated:
            epoch.close()
            self.epoch = renewed = self._parts.make_epoch(run, self)
            if renewed is None:
                raise MisconfigurationException(
                    "The training loader that was made anew in this run has no batches: return one with batches, or set"
                    " `trainer.should_stop` where there are none."
                )
            epoch = renewed
        if dispatch.refresh("fit") or self._changed or self._changes != self._parts.changes:
            self._changes = self._parts.changes
            self.epoch = epoch = self._parts.remake(run, self)
            self._may_save_in_validation = any(map(dispatch.listeners, _MAY_SAVE))
        return epoch

    def _end_epoch(self, epoch: TrainingEpoch) -> None:
        run = self._run
        logged, _ = run.metrics.close_epoch(run.results)
        run.unwritten.update(values=logged, local=False)
        run.dispatch.call("on_train_epoch_end")
        logged |= run.metrics.close_epoch(run.results)[0]  # what the hooks logged: monitoring callbacks see it
        step = max(run.progress.logging_step - 1, 0)
        run.write(logged, step)
        run.unwritten.update(values={}, local=True)
        epoch.end()  # before monitoring callbacks, so that their checkpoint has the whole epoch's end
        run.dispatch.call(MONITORS, hook="on_train_epoch_end")
        run.write(run.metrics.close_epoch(run.results, local=True)[0], step)
        run.unwritten.clear()
        run.results.reset()
        run.progress.epoch += 1
        epoch.agree_to_stop()

    def _sanity_check(self) -> None:
        run = self._run
        validation, batches = self._parts.first_validation(run)
        # there may be fewer samples than ranks, and a rank without a batch takes part in what the others do
        if validation is None or not run.fabric.strategy.reduce_boolean_decision(any(batches), all=False):
            return
        run.state.stage = RunningStage.SANITY_CHECKING
        with isolate_rng():  # so that training draws the random numbers that it draws without the check
            run.dispatch.call("on_sanity_check_start")
            validation(batches, silent=True)
            run.dispatch.call("on_sanity_check_end")
        run.metrics.clear()

    def validate(self, interrupted: Callable[[int], bool]) -> bool:
        """Run a validation in the middle of training; it ends between two batches once ``interrupted`` returns True.

        Returns:
            Whether the validation came to its end. If not, a run resumed from a checkpoint saved now begins it anew.
        """
        run, state = self._run, self._run.state
        validation = self._parts.validation(run)
        if validation is None:
            return True
        state.stage = RunningStage.VALIDATING
        # A short validation is not interrupted. Ranks may disagree on which is short, so several always ask.
        watched = run.fabric.world_size > 1 or self._validation_s > _SHORT_S
        if watched or self._may_save_in_validation:
            run.before_validation.update(moment(run))
            if run.loggers and run.fabric.is_global_zero:
                run.before_validation["loggers"] = logger_states(run.loggers)
        began = time.monotonic()
        completed = validation(interrupted=interrupted if watched else None) is not None
        self._validated_at = time.monotonic()
        self._validation_s = self._validated_at - began
        state.stage = RunningStage.TRAINING
        if completed:
            run.before_validation.clear()
        return completed

    @property
    def validates(self) -> bool:
        """Whether fit validates, as far as that is known."""
        return self._parts.validates

    def validation_elapsed(self, span: timedelta) -> bool:
        """Return whether the last validation ended at least ``span`` ago; every rank asks after each batch."""
        return self._clock.over(span.total_seconds() - (time.monotonic() - self._validated_at))

    def may_stop(self) -> bool:
        """Return whether ``should_stop`` may end the fit: not before ``min_epochs`` and ``min_steps``."""
        d, progress = self._controls, self._run.progress
        epochs = progress.epoch + (1 if progress.is_last_batch else 0)
        enough = (not d.min_epochs or epochs >= d.min_epochs) and (not d.min_steps or progress.step >= d.min_steps)
        if not enough and not self._told_min:
            self._told_min = True
            rank_zero_info(
                f"Trainer was signaled to stop but the required `min_epochs={d.min_epochs}` or"
                f" `min_steps={d.min_steps}` has not been met: training goes on until then."
            )
        return enough

    def stop_is_pending(self) -> bool:
        """Return whether a stop that the run before this one was asked for is still to come.

        The minimum held it back, or the run was saved before the end of the batch in which it was asked for.
        """
        return self._run.progress.phase is not Phase.BETWEEN or not self.may_stop()

    def _done(self) -> str:
        """Return the reason why training is over; empty while training goes on."""
        d, progress = self._controls, self._run.progress
        if progress.phase is not Phase.BETWEEN:  # resumed in the end of a batch, and the epoch's end follows
            return ""
        if d.max_steps != -1 and progress.step >= d.max_steps:
            return f"`max_steps={d.max_steps}` reached"
        if d.max_epochs is not None and -1 < d.max_epochs <= progress.epoch:
            return f"`max_epochs={d.max_epochs}` reached"
        return "`trainer.should_stop` was set" if self._controls.should_stop and self.may_stop() else ""
