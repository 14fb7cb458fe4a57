"""What ends training before its time: ``should_stop``, and signals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from treadle.run.run import Run
from treadle.run.signals import ANNOUNCED, TERMINATED, Signals
from treadle_fabric import StopAgreement

__all__ = ["Controls", "Stops"]

_BOUNDARIES_PER_BATCH: Final = 2**32  # boundaries from one training batch to the next: room for those of a validation


class Controls(Protocol):
    """What the user and callbacks may change while training."""

    should_stop: bool
    accumulate_grad_batches: int
    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None


class Stops:
    """Asks whether training ends here; several ranks get the same answer at the same boundary.

    Args:
        run: the run.
        controls: holds ``should_stop``.
        signals: notes signals that ask the process to terminate.
        agreement: how several ranks agree; None where there is only one.
        may_stop: whether ``should_stop`` is heeded.
    """

    def __init__(
        self,
        run: Run,
        controls: Controls,
        signals: Signals,
        agreement: StopAgreement | None,
        may_stop: Callable[[], bool],
    ) -> None:
        self._run, self._controls, self._signals = run, controls, signals
        self._agreement, self._may_stop = agreement, may_stop
        self._signal = ""  # ANNOUNCED or TERMINATED, where a signal ends training

    def after_batch(self) -> tuple[bool, bool]:
        """Whether to stop after this batch, and whether because of a signal."""
        stop = self._controls.should_stop and self._may_stop()
        if self._agreement is None:
            return stop, self._is_signal(self._signals.wish)
        wish = self._signals.wish or ("stop" if stop else "")
        reason = self._agreement.at_boundary(self._run.progress.batches * _BOUNDARIES_PER_BATCH, wish)
        if reason == "stop":
            self._controls.should_stop = True
        return reason == "stop", self._is_signal(reason)

    def after_validation(self) -> bool:
        """Whether to stop, where any rank set ``should_stop``."""
        return self.agree() and self._may_stop()

    def agree(self) -> bool:
        """Set ``should_stop`` where any rank did; every rank calls it."""
        if self._agreement is not None:
            strategy = self._run.fabric.strategy
            self._controls.should_stop = strategy.reduce_boolean_decision(self._controls.should_stop, all=False)
        return self._controls.should_stop

    def before_validation_batch(self, batch: int) -> bool:
        """Whether a validation ends before this batch, on all ranks, because one was asked to terminate."""
        wish = self._signals.wish
        if self._agreement is not None:
            wish = self._agreement.at_boundary(self._run.progress.batches * _BOUNDARIES_PER_BATCH + batch + 1, wish)
        return self._is_signal(wish)

    def _is_signal(self, reason: str) -> bool:
        self._signal = reason if reason in (ANNOUNCED, TERMINATED) else ""
        return bool(self._signal)

    def terminate(self) -> None:
        """End the run because of a signal; every rank calls it."""
        self._signals.raise_received(together=True, announced=self._signal == ANNOUNCED)
