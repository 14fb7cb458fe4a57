"""The parts of a fit: its loaders, its loop, and the state that a resumed fit has still to restore."""

from __future__ import annotations

from typing import Any

from treadle.checkpoint.exact import capture_exact, restore_exact
from treadle.data.training import TrainingData
from treadle.loops.epoch import TrainingEpoch
from treadle.loops.evaluate import Evaluation
from treadle.loops.fit import FitLoop
from treadle.loops.schedule import total_steps
from treadle.loops.stopping import Controls
from treadle.run.run import ReadyRun, Run
from treadle.run.signals import Signals
from treadle.trainer import assembly
from treadle.trainer.session import Session
from treadle.trainer.settings import Settings

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
        self._session, self._run, self._settings = session, run, settings
        self._train, self._val = train, val
        self._controls, self._signals = controls, signals
        self._unrestored: dict[str, Any] = {}  # what the checkpoint holds for the first batch
        self._data_asked = False
        self.data: TrainingData | None = None
        """The training batches; None before they are asked for, and where there are none."""
        self.loop: FitLoop | None = None

    def make_loop(self, run: ReadyRun, exact: dict[str, Any]) -> FitLoop:
        """Make the loop, and the validation in it.

        Args:
            run: The run, with its optimizers.
            exact: The ``treadle`` entry of the checkpoint that the fit goes on from; empty without one.
        """
        self._unrestored = exact
        validation = self.make_validation(run)
        batches = validation.data.num_batches if validation is not None else []
        self.loop = FitLoop(
            run,
            self,
            self._settings.durations,
            self._controls,
            sanity=self._settings.sanity_batches(batches),
            validation=validation,
            reload_every=self._settings.reload_dataloaders_every_n_epochs,
        )
        return self.loop

    def estimated_steps(self) -> float:
        """Compute the optimizer steps of the whole fit; asks for the training loader if that was not done yet."""
        self._ask_for_data()
        batches = self.data.num_batches if self.data is not None else 0
        return total_steps(self._settings.durations, batches, self._controls.accumulate_grad_batches)

    def exact_state(self, run: ReadyRun) -> dict[str, Any]:
        """Collect what a checkpoint keeps so that the fit goes on to the last bit. Every rank calls it."""
        return self._unrestored or capture_exact(run, self.data)

    def saved_state(self, run: ReadyRun) -> dict[str, Any]:
        """Collect the same for a checkpoint, and tell the user once where going on from it may not be exact."""
        state = self.exact_state(run)
        if self.data is not None:
            self.data.epochs.tell()
        return state

    # What the loop asks for

    def make_epoch(self, run: ReadyRun, loop: FitLoop) -> TrainingEpoch | None:
        """Make the epoch loop; None without batches. From the second call on, the training loader is a new one."""
        if loop.epoch is not None:
            before, self._data_asked = self.data, False
            self._ask_for_data()
            if before is not None and self.data is not None:
                self.data.epochs.follow(before.epochs)
        self._ask_for_data()
        if self.data is None:
            return None
        return assembly.make_epoch(run, self._settings, self.data, loop, self._controls, self._signals)

    def make_validation(self, run: ReadyRun) -> Evaluation | None:
        """Make the validation, with new loaders; None where fit does not validate."""
        loaders = assembly.validation_loaders(run, self._settings, self._val)
        if loaders is None:
            return None
        data = self._session.evaluations["val"] = assembly.evaluation_data(run, self._settings, loaders, "val")
        return Evaluation(run, data, "validation", inference_mode=self._settings.inference_mode)

    def restore(self, run: ReadyRun) -> None:
        """Restore, once, the state that a resumed run had at its checkpoint; the random state comes last."""
        if self._unrestored:  # until all of it is back, a save keeps it as it was
            assert self.data is not None
            restore_exact(run, self._unrestored, self.data, accumulate=self._controls.accumulate_grad_batches)
            self._unrestored = {}

    def _ask_for_data(self) -> None:
        if not self._data_asked:
            self.data = assembly.training_data(self._run, self._settings, self._train)
            self._data_asked = True
