"""Which batches of an epoch make up an optimizer step, also where a resumed run goes on with other settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Accumulation", "Place", "decide"]


class Place(NamedTuple):
    """The place of a batch in its accumulation."""

    done: float
    """The number of batches of the accumulation before this one; 0 where the accumulation begins."""
    window: float
    """The number of batches of the accumulation: fewer at the end of an epoch of known length."""
    ends: bool
    """Whether the accumulation ends with this batch, whatever the length of the epoch."""


@dataclass(frozen=True, slots=True)
class Accumulation:
    """How the batches of an epoch are divided into accumulations, from a batch on.

    Usually the first accumulation begins with batch 0. In a run that was resumed with other settings in the middle of
    an accumulation, the first accumulation also has the batches that no optimizer had stepped for when the checkpoint
    was saved; it gets the batches that it lacks to be as large as the others, at least one.
    """

    every: int = 1
    """Batches of an accumulation."""
    begin: int = 0
    """The first batch that is divided so; those before it were divided in an earlier run."""
    carried: float = 0
    """What no optimizer had stepped for before :attr:`begin`, in batches of the present size."""

    @property
    def divides(self) -> bool:
        """Whether any accumulation has more than one batch."""
        return self.every > 1 or self.carried > 0

    @property
    def lacking(self) -> int:
        """The number of batches, from :attr:`begin` on, that join what was carried; 0 where nothing was."""
        return max(1, math.ceil(self.every - self.carried)) if self.carried else 0

    def place(self, batch: int, total: float) -> Place:
        """The place of a batch.

        Args:
            batch: The number of the batch in its epoch, at least :attr:`begin`.
            total: The number of batches of the epoch; infinity where that is unknown.
        """
        count, lacking = batch - self.begin, self.lacking
        if count < lacking:
            return Place(self.carried + count, self.carried + min(lacking, total - self.begin), count + 1 == lacking)
        done = (count - lacking) % self.every
        return Place(done, min(self.every, total - (batch - done)), done + 1 == self.every)


def decide(
    saved: Accumulation, done: Place, *, every: int, batch: int, size: float, total: float
) -> tuple[Accumulation, float]:
    """How a resumed run goes on with accumulations, and what the gradients of the checkpoint are multiplied by.

    The gradients in a checkpoint are a sum that was divided by the batches of its accumulation. In the run that goes
    on, they become their part of the mean over all samples that the next optimizer step is for.

    Args:
        saved: What the checkpoint was written with.
        done: The place that the next batch had in the run that saved it.
        every: Batches of an accumulation now.
        batch: The number of the next batch, as batches are counted now.
        size: The number of batches of now that have the samples of one batch in the checkpoint; 1 if it is unchanged.
        total: The number of batches of the epoch now; infinity where that is unknown.
    """
    unchanged = every == saved.every and size == 1
    now = saved if unchanged else Accumulation(every, batch, done.done * size)
    return now, done.window * size / now.place(batch, total).window if done.done else 1.0
