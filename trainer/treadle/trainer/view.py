"""``trainer.fit_loop``: the counters and bounds of a fit under the names that programs for Lightning read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from treadle.run.progress import FitProgress, Phase
from treadle.stages import RunningStage
from treadle.trainer.fitting import Fitting

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = ["Counts", "EpochLoopView", "FitLoopView", "Progress"]


class Counts(NamedTuple):
    """How many batches or epochs have come how far."""

    ready: int
    started: int
    processed: int
    completed: int


class Progress(NamedTuple):
    """The counts of all epochs, and of the current one."""

    total: Counts
    current: Counts
    is_last_batch: bool = False


class _Bounds:
    """The bounds of a fit. Setting one is the same as setting it on the trainer; nothing else can be set."""

    __slots__ = ("_trainer", "restarting")

    def __init__(self, trainer: Trainer, restarting: bool) -> None:
        self._trainer = trainer
        self.restarting = restarting
        """Whether the state of a checkpoint, or of a stop in mid-epoch, is still to be restored."""

    @property
    def max_steps(self) -> int:
        """``trainer.max_steps``."""
        return self._trainer.max_steps

    @max_steps.setter
    def max_steps(self, steps: int) -> None:
        self._trainer.max_steps = steps

    @property
    def min_steps(self) -> int | None:
        """``trainer.min_steps``."""
        return self._trainer.min_steps

    @min_steps.setter
    def min_steps(self, steps: int | None) -> None:
        self._trainer.min_steps = steps

    @property
    def global_step(self) -> int:
        """``trainer.global_step``."""
        return self._trainer.global_step

    @property
    def batch_idx(self) -> int:
        """The number of the current batch in its epoch; -1 before the first."""
        return self._batches.current.ready - 1

    @property
    def total_batch_idx(self) -> int:
        """The number of the current batch in all epochs; -1 before the first."""
        return self._batches.total.ready - 1

    @property
    def _in_epoch(self) -> bool:
        return self._trainer.state.stage is RunningStage.TRAINING

    @property
    def _batches(self) -> Progress:
        p: FitProgress = self._trainer.fit_progress
        # The counters grow after the step: in the step, and before it, the current batch is not counted yet.
        within = int(self._in_epoch and p.begun and not p.epoch_ended and p.phase is Phase.BETWEEN)
        ending = int(p.phase is Phase.BATCH_END)
        total, current = (Counts(n + within, n + within, n, n - ending) for n in (p.batches, p.batch))
        return Progress(total, current, p.is_last_batch)


class EpochLoopView(_Bounds):
    """``trainer.fit_loop.epoch_loop``: the batches of a fit."""

    __slots__ = ()

    @property
    def batch_progress(self) -> Progress:
        """The batches: ready and started count the current batch, completed does not."""
        return self._batches


class FitLoopView(_Bounds):
    """``trainer.fit_loop``: the epochs of a fit."""

    __slots__ = ("_fitting",)

    def __init__(self, trainer: Trainer, fitting: Fitting | None) -> None:
        super().__init__(trainer, fitting is not None and fitting.restoring)
        self._fitting = fitting

    @property
    def max_epochs(self) -> int | None:
        """``trainer.max_epochs``."""
        return self._trainer.max_epochs

    @max_epochs.setter
    def max_epochs(self, epochs: int | None) -> None:
        self._trainer.max_epochs = epochs

    @property
    def min_epochs(self) -> int | None:
        """``trainer.min_epochs``."""
        return self._trainer.min_epochs

    @min_epochs.setter
    def min_epochs(self, epochs: int | None) -> None:
        self._trainer.min_epochs = epochs

    @property
    def epoch_progress(self) -> Progress:
        """The epochs: ready and started count the current epoch, completed does not."""
        p: FitProgress = self._trainer.fit_progress
        ready = p.epoch + self._in_epoch
        counts = Counts(ready, ready, p.epoch + p.epoch_ended, p.epoch)
        return Progress(counts, counts)

    def forward_epoch(self) -> int:
        """Run ``training_step`` on the batches of an epoch, for what a forward pass leaves in layers like batch norm.

        Nothing learns, nothing is logged, and random states and the order of later batches stay. Every rank calls it.

        Returns:
            The number of batches; 0 where the steps cannot be run without learning, or the batches cannot be drawn
            again.
        """
        return self._fitting.forward_epoch() if self._fitting is not None else 0

    @property
    def epoch_loop(self) -> EpochLoopView:
        """The batches of the fit."""
        return EpochLoopView(self._trainer, self.restarting)
