"""What a fit leaves for the next one: with the same module the next fit goes on, with another one it begins anew."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch.nn import Module

from treadle.callbacks import Callback
from treadle.module import LightningModule
from treadle.module.overriding import overrides
from treadle.run.progress import FitProgress
from treadle_fabric import MisconfigurationException, rank_zero_info
from treadle_fabric.checkpoint import PerRank
from treadle_fabric.loggers import Logger
from treadle_fabric.randomness import own_rng_states, same_rng_states, set_rng_states

__all__ = ["Continuation", "Fits"]


@dataclass(frozen=True)
class Continuation:
    """Where a fit ended.

    Attributes:
        module: The module that was trained.
        progress: Its counters; in the middle of an epoch they are those of the last batch, before the end hooks.
        exact: The state in the middle of an epoch, as a checkpoint keeps it; empty between two epochs.
        rng: The random state at the end of the fit.
        certain: Whether all ranks ended at the same batch.
    """

    module: LightningModule
    progress: FitProgress
    exact: dict[str, Any] = field(default_factory=dict)
    rng: dict[str, Any] = field(default_factory=own_rng_states)
    certain: bool = True


class Fits:
    """The fits of one trainer, one after the other."""

    def __init__(self) -> None:
        self._left: Continuation | None = None
        self._fresh: list[tuple[Callback, Callback]] = []  # callbacks, and copies from before their first fit
        self._rng: dict[str, Any] = {}  # the random state at the end of the trainer's last run

    def begin(
        self, module: LightningModule, callbacks: Iterable[Callback], loggers: Iterable[Logger], *, resumes: bool
    ) -> None:
        """Go on where the last fit of this module ended. After another module's fit, begin anew.

        Args:
            module: The module to train.
            callbacks: Their states begin anew with another module.
            loggers: They begin a new version with another module.
            resumes: Whether a checkpoint says where to go on.

        Raises:
            MisconfigurationException: The ranks may have ended the last fit at different batches.
        """
        left = self._left
        if left is not None and left.module is not module:
            rank_zero_info(
                f"Another {type(module).__qualname__} than in the last fit: counters, callbacks and loggers begin anew."
            )
            for callback, fresh in self._fresh:
                callback.load_state_dict(copy.deepcopy(fresh.state_dict()))
            for logger in loggers:
                logger.begin_anew()
            self._left = left = None
        if left is not None and not resumes:
            if not left.certain:
                raise MisconfigurationException(
                    "The last fit was interrupted, and its ranks may be at different batches, so the same Trainer"
                    " cannot go on: pass `ckpt_path`, or make a new Trainer to begin anew."
                )
            self._left = self._with_random_state(left)
        known = [id(callback) for callback, _ in self._fresh]
        for callback in callbacks:
            if id(callback) not in known and overrides(callback, "state_dict", Callback):
                shared = {id(value): value for value in vars(callback).values() if isinstance(value, Module)}
                with suppress(Exception):  # one that cannot be copied keeps its state
                    self._fresh.append((callback, copy.deepcopy(callback, shared)))

    def _with_random_state(self, left: Continuation) -> Continuation:
        """Go on with the random state of the fit's end, unless the user's program has drawn or seeded since."""
        now = own_rng_states()
        if self._rng and same_rng_states(now, self._rng):
            set_rng_states(left.rng)
            return left
        if not left.exact:
            return left
        ranks = PerRank({**left.exact["ranks"].value, "rng": now})
        return replace(left, exact={**left.exact, "ranks": ranks})

    @property
    def progress(self) -> FitProgress:
        """The counters with which the fit begins."""
        return FitProgress() if self._left is None else replace(self._left.progress)

    @property
    def exact(self) -> dict[str, Any]:
        """The state that the fit restores before its first batch; empty between two epochs."""
        return {} if self._left is None else self._left.exact

    def end(self, left: Continuation) -> None:
        """Remember where a fit ended."""
        left.progress.settle()
        self._left = left

    def after_run(self) -> None:
        """Remember the random state, at the end of any run of the trainer."""
        self._rng = own_rng_states()
