"""Types of arguments, where users of Lightning Fabric look for them."""

from treadle_fabric.types import LRScheduler, PathLike, Stateful

__all__ = ["LRScheduler", "PathLike", "Stateful"]
