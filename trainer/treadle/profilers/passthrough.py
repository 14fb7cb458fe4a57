"""The profiler of a run without profiling."""

from __future__ import annotations

from typing import ClassVar

from treadle.profilers.profiler import Profiler

__all__ = ["PassThroughProfiler"]


class PassThroughProfiler(Profiler):
    """Measures nothing; ``trainer.profiler`` is one where the Trainer got no profiler.

    Args:
        dirpath: Not used.
        filename: Not used.
    """

    records: ClassVar[bool] = False

    def start(self, action_name: str) -> None:
        """Do nothing."""

    def stop(self, action_name: str) -> None:
        """Do nothing."""
