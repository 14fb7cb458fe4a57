"""The parts of a fit: its loaders, its loop, and the state that a resumed fit has still to restore."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from treadle.checkpoint.exact import capture_exact, capture_loggers, restore_exact, write_left
from treadle.data.evaluation import EvaluationData
from treadle.data.training import TrainingData
from treadle.loops.epoch import TrainingEpoch
from treadle.loops.evaluate import Evaluation
from treadle.loops.fit import FitLoop
from treadle.loops.forward_epoch import forward_epoch
from treadle.loops.schedule import total_steps
from treadle.loops.stopping import Controls
from treadle.run.run import ReadyRun, Run
from treadle.run.signals import Signals
from treadle.trainer import assembly
from treadle.trainer.continuation import Continuation
from treadle.trainer.session import Session
from treadle.trainer.settings import Settings
from treadle_fabric import isolate_rng, rank_zero_info
from treadle_fabric.randomness import own_rng_states

__all__ = ["Fitting"]


class Fitting:
    """The loaders and the loop of a fit. The trainer keeps its last ``Fitting``, so that users can look at them.

    Args:
        session: The session that the fit belongs to.
        run: The run before the module is set up: schedulers may ask for the number of steps then.
        settings: The trainer's settings.
        train: The training batches that the user passed; None: those of the data module or the module.
        val: The validation batches, likewise.
        controls: Holds ``should_stop`` and ``accumulate_grad_batches``.
        signals: The signals that end the fit after the current batch.
    """

    def __init__(
        self,
        session: Session,
        run: Run,
        settings: Settings,
        train: Any,
        val: Any,
        controls: Controls,
        signals: Signals,
    ) -> None:
        self._session, self._settings = session, settings
        self.given = {"train": train, "val": val}
        """The loaders that the user passed; None where data module or module make them."""
        self._controls, self._signals = controls, signals
        self._unrestored: dict[str, Any] = {}  # what the checkpoint holds for the first batch
        self._data_asked = False
        self.outdated = False
        """Whether the training loader is to be made anew before the next epoch."""
        self.validates = assembly.may_validate(run, settings, val)
        """Whether fit validates. Known for certain once the validation loaders were asked for."""
        self._validation: Evaluation | None = None
        self._loaders_of = 0  # the epoch for which the validation loaders were made
        self.data: TrainingData | None = None
        """The training batches; None before they are asked for, and where there are none."""
        self.loop: FitLoop | None = None
        self._stopped: Continuation | None = None  # at the last stop in mid-epoch
        self._ended_at: Continuation | None = None  # that stop, where the fit ended there

    @property
    def run(self) -> Run | None:
        """The run of the fit."""
        return self._session.run

    @property
    def restoring(self) -> bool:
        """Whether the state of a checkpoint, or of the last fit, is still to be restored."""
        return bool(self._unrestored)

    @property
    def val_check_batch(self) -> float:
        """The number of training batches between two validations; infinity where epochs or time decide."""
        return self._epoch.val_check_batch if self._epoch is not None else math.inf

    def bound_steps(self) -> None:
        """Take over ``max_steps``, which was set: the epoch that runs may end sooner or later."""
        if self._epoch is not None:
            self._epoch.bound_steps()

    @property
    def _epoch(self) -> TrainingEpoch | None:
        return self.loop.epoch if self.loop is not None else None

    def make_loop(self, run: ReadyRun, exact: dict[str, Any]) -> FitLoop:
        """Make the loop.

        Args:
            run: The run, with its optimizers.
            exact: The ``treadle`` entry of the checkpoint that the fit goes on from, or the state in which the last fit
                stopped; empty where an epoch begins.
        """
        self._unrestored = exact
        self.loop = FitLoop(
            run,
            self,
            self._controls,
            reload_every=self._settings.reload_dataloaders_every_n_epochs,
        )
        return self.loop

    def estimated_steps(self) -> float:
        """Compute the optimizer steps of the whole fit; asks for the training loader if that was not done yet."""
        if not self._data_asked:
            rank_zero_info("Loading `train_dataloader` to estimate number of stepping batches.")
        self._ask_for_data()
        batches = self.data.num_batches if self.data is not None else 0
        return total_steps(self._settings.durations, batches, self._controls.accumulate_grad_batches)

    def exact_state(self, run: ReadyRun) -> dict[str, Any]:
        """Collect what a checkpoint keeps so that the fit goes on to the last bit. Every rank calls it."""
        return self._ended_at.exact if self._ended_at is not None else self._unrestored or capture_exact(run, self.data)

    def forward_epoch(self) -> int:
        """Run ``training_step`` on the batches of an epoch, and learn nothing; see :func:`forward_epoch`."""
        run = self._session.run
        return forward_epoch(run, self.data) if isinstance(run, ReadyRun) else 0

    def as_saved(self, run: ReadyRun) -> ReadyRun:
        """Give the run with the counters of a checkpoint: after a fit that stopped in mid-epoch, those of the stop."""
        return run if self._ended_at is None else replace(run, progress=replace(self._ended_at.progress))

    def saved_state(self, run: ReadyRun) -> dict[str, Any]:
        """Collect the same for a checkpoint, and tell the user once where going on from it may not be exact."""
        state = self.exact_state(run)
        if self.data is not None:
            self.data.epochs.tell()
        return state if self._ended_at is not None else {**state, "loggers": capture_loggers(run)}

    # What the loop asks for

    def make_epoch(self, run: ReadyRun, loop: FitLoop) -> TrainingEpoch | None:
        """Make the epoch loop; None without batches. From the second call on, the training loader is a new one."""
        self.outdated = False
        if loop.epoch is not None:
            before, self._data_asked = self.data, False
            self._ask_for_data()
            if before is not None and self.data is not None:
                self.data.epochs.follow(before.epochs)
        self._ask_for_data()
        if self.data is None or not self.data.num_batches:
            return None
        return assembly.make_epoch(run, self._settings, self.data, loop, self._controls, self._signals)

    @property
    def changes(self) -> int:
        """How often a setting was changed."""
        return self._settings.changes

    def remake(self, run: ReadyRun, loop: FitLoop) -> TrainingEpoch:
        """Make epoch loop and validation again, with the same loaders: listeners or settings have changed."""
        assert self.data is not None
        if self._validation is not None:
            self._validation = self._evaluation(run, self._validation.data)
        return assembly.make_epoch(run, self._settings, self.data, loop, self._controls, self._signals)

    def first_validation(self, run: ReadyRun) -> tuple[Evaluation | None, list[float]]:
        """Make the validation if the sanity check or the first epoch needs it; also give the sanity check's batches."""
        every = self._settings.check_val_every_n_epoch
        in_first_epoch = every is not None and (run.progress.epoch + 1) % every == 0
        if not in_first_epoch and not self._settings.num_sanity_val_steps:
            return None, []
        validation = self._renew_validation(run)
        return validation, [] if validation is None else self._settings.sanity_batches(validation.data.num_batches)

    def validation(self, run: ReadyRun) -> Evaluation | None:
        """Give the validation with the loaders that this epoch is to have; None where there are none."""
        epoch, every, before = run.progress.epoch, self._settings.reload_dataloaders_every_n_epochs, self._validation
        reloads = self._loaders_of < 0 or (every and epoch // every != self._loaders_of // every)
        if self.validates and (before is None or reloads):
            with isolate_rng():  # a resumed run makes them at other times
                self._renew_validation(run)
        return self._validation

    def _renew_validation(self, run: ReadyRun) -> Evaluation | None:
        self._loaders_of = run.progress.epoch
        loaders = assembly.validation_loaders(run, self.given["val"]) if self.validates else None
        self.validates = loaders is not None
        before, self._validation = self._validation, None
        if self.validates:
            self._validation = self._make_validation(run, loaders, before)
        elif before is not None:
            before.forget()
        return self._validation

    def _make_validation(self, run: ReadyRun, loaders: Any, before: Evaluation | None) -> Evaluation:
        data = self._session.evaluations["val"] = assembly.evaluation_data(run, self._settings, loaders, "val")
        if before is not None and len(before.data.loaders) != len(data.loaders):
            before.forget()
        return self._evaluation(run, data)

    def _evaluation(self, run: ReadyRun, data: EvaluationData) -> Evaluation:
        return Evaluation(run, data, "validation", inference_mode=False)

    def nothing_left(self, run: ReadyRun) -> None:
        """Have the loggers keep all that the run has logged, because nothing is trained again."""
        if not write_left(run, self._unrestored):
            for logger in run.loggers:
                logger.supersede_nothing()

    def renew_loaders(self) -> None:
        """Have all loaders made anew when they are needed next: a batch size has changed, for example."""
        if self._epoch is None:
            self._data_asked, self.data = False, None
        else:
            self.outdated = True
        self._loaders_of = -1

    def stopped(self, run: ReadyRun) -> None:
        """Keep the state of a stop in the middle of an epoch, where a later fit goes on."""
        exact = {**self.exact_state(run), "loggers": capture_loggers(run)}
        self._stopped = Continuation(run.module, replace(run.progress), exact)

    def left(self, run: ReadyRun, *, interrupted: bool) -> Continuation:
        """Tell where the fit ended, for a later fit that goes on."""
        run.maps.release()  # where there was no batch
        module, progress, stopped = run.module, replace(run.progress), self._stopped
        if stopped is not None and stopped.progress.batches == progress.batches:  # no batch since
            self._ended_at = stopped
            return replace(stopped, rng=own_rng_states())
        if interrupted and run.fabric.world_size > 1:
            return Continuation(module, progress, certain=False)
        return Continuation(module, progress, self.exact_state(run) if interrupted else self._unrestored)

    def restore(self, run: ReadyRun) -> None:
        """Restore, once, the state that a resumed run had at its checkpoint; the random state comes last."""
        if self._unrestored:  # until all of it is back, a save keeps it as it was
            assert self.data is not None
            restore_exact(run, self._unrestored, self.data, accumulate=self._controls.accumulate_grad_batches)
            run.changes.restored(run.module)
            self._unrestored = {}
            run.maps.release()

    def _ask_for_data(self) -> None:
        if not self._data_asked:
            run = self._session.run
            assert run is not None
            self.data = assembly.training_data(run, self._settings, self.given["train"])
            self._data_asked = True
