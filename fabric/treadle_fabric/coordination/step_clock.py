"""A clock that all ranks read alike, without a collective at every step."""

from __future__ import annotations

import time

from treadle_fabric.coordination.on_rank_zero import Ranked

__all__ = ["StepClock"]


class StepClock:
    """Says at a training step, alike on every rank, whether a span of rank 0's time is over.

    One process looks at its own clock. Several agree by broadcast, but not at every step: rank 0's pace tells how many
    steps pass before half of what remains is over (5 s at most), and all ranks look again there.
    """

    _LONGEST = 5.0  # seconds between two looks

    def __init__(self, fabric: Ranked) -> None:
        self._fabric = fabric
        self._alone = fabric.world_size == 1
        self._steps = 0
        self._stride = 1
        self._since = time.monotonic()

    def over(self, remaining: float) -> bool:
        """Call once a step on every rank with the seconds that remain on its own clock."""
        if self._alone:
            return remaining <= 0
        self._steps += 1
        if self._steps < self._stride:
            return False
        now = time.monotonic()
        pace = (now - self._since) / self._steps
        remaining, pace = self._fabric.broadcast((remaining, pace))
        ahead = min(remaining / 2, self._LONGEST) / max(pace, 1e-6)
        # at most doubled, so that a few quick steps do not put the next look far away
        self._stride = max(1, min(int(ahead), 2 * self._stride))
        self._steps, self._since = 0, now
        return remaining <= 0
