"""Model parallelism, where users of a trainer look for it."""

from treadle_fabric.strategies import ModelParallelStrategy

__all__ = ["ModelParallelStrategy"]
