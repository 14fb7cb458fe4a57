"""The loader that runs several loaders at once, where users of a trainer look for it."""

from treadle_fabric.data import CombinedLoader

__all__ = ["CombinedLoader"]
