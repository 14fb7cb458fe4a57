"""The base of strategies, where users of a trainer look for it."""

from treadle_fabric.strategies import Strategy

__all__ = ["Strategy"]
