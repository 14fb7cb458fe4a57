"""Data parallelism, where users of a trainer look for it."""

from treadle_fabric.strategies import DDPStrategy

__all__ = ["DDPStrategy"]
