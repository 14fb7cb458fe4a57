"""Data parallelism on devices of XLA, where users of a trainer look for it."""

from treadle_fabric.strategies import XLAStrategy

__all__ = ["XLAStrategy"]
