"""Fully sharded data parallelism, where users of a trainer look for it."""

from treadle_fabric.strategies import FSDPStrategy

__all__ = ["FSDPStrategy"]
