"""Forward passes in lockstep, where ranks work together in each and have unequal numbers of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from treadle.run.run import ReadyRun

__all__ = ["Lockstep", "lockstep_of"]


class Lockstep:
    """Lets every rank take part in each forward pass, also ranks that have no batch left.

    Nothing is padded in an evaluation: one rank may have a batch more than another. Before each pass the ranks vote
    whether they have a batch, which is one message between hosts. A rank that has none takes part in the pass of the
    others, until no rank has one. All ranks go through the same loaders in the same order.

    Args:
        run: The run.
        method: The method of the module that runs a batch, in one pass of the engine: "validation_step".
        mode: Makes the context of the passes: whether they record gradients.
    """

    def __init__(self, run: ReadyRun, method: str, mode: Callable[[], AbstractContextManager[Any]]) -> None:
        self._strategy, self._engine, self._method, self._mode = run.fabric.strategy, run.engine, method, mode
        self._others = False  # other ranks may have batches of the present loader left

    def turns(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield this rank's batches, each when all ranks have come to a pass; at the end, take part in those left."""
        self._others = True
        for batch in batches:
            self._strategy.begin_vote(True)()
            yield batch
            self._finish()
        self.finish()

    def turns_of_all(self, batches: Iterator[Any]) -> Iterator[Any]:
        """As :meth:`turns`, and yield None for a pass of the other ranks only: all ranks get the same number."""
        self._others = True
        for batch in batches:
            self._strategy.begin_vote(True)()
            yield batch
            self._finish()
        while self._joined():
            yield None

    def _finish(self) -> None:
        """The step of a batch may have ended before it ran all of the model."""
        with self._mode():
            self._strategy.finish_forward(self._engine, self._method)

    def skip(self) -> None:
        """Run no batch of a loader, and take part in the passes of the other ranks."""
        self._others = True
        self.finish()

    def leave(self, loaders: int) -> None:
        """Run no batch any more, and take part in the passes of the other ranks.

        Args:
            loaders: The number of loaders after the present one.
        """
        self.finish()
        for _ in range(loaders):
            self.skip()

    def finish(self) -> None:
        """Take part in the passes of the ranks that have batches of the present loader left."""
        while self._others and self._joined():
            pass

    def _joined(self) -> bool:
        """Take part in a pass of other ranks; return whether there was one."""
        self._others = self._strategy.begin_vote(False)() > 0
        if self._others:
            with self._mode():
                self._strategy.join_forward(self._engine, self._method)
        return self._others


def lockstep_of(run: ReadyRun, method: str, mode: Callable[[], AbstractContextManager[Any]]) -> Lockstep | None:
    """A :class:`Lockstep`; None where the strategy's ranks make forward passes on their own."""
    strategy = run.fabric.strategy
    return Lockstep(run, method, mode) if strategy.forward_is_collective and strategy.world_size > 1 else None
