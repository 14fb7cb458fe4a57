"""The base of strategies with several processes, where users of a trainer look for it."""

from treadle_fabric.strategies import ParallelStrategy

__all__ = ["ParallelStrategy"]
