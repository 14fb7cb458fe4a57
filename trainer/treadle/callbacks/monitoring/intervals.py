"""When a callback that follows the loggers' interval is due."""

from __future__ import annotations

__all__ = ["is_multiple"]


def is_multiple(number: int, interval: int) -> bool:
    """Return whether ``number`` is a multiple of an interval such as ``log_every_n_steps``, of which 0 means never."""
    return interval > 0 and number % interval == 0
