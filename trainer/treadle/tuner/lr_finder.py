"""The results of a search for a learning rate, where users of a trainer look for them."""

from treadle.searches import LRFinder

__all__ = ["LRFinder", "_LRFinder"]

_LRFinder = LRFinder
