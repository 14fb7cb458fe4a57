"""The wrappers at the path of ``lightning.fabric.wrappers``."""

from treadle_fabric.data import FabricDataLoader
from treadle_fabric.setup import FabricModule, FabricOptimizer, is_wrapped

__all__ = ["FabricDataLoader", "FabricModule", "FabricOptimizer", "is_wrapped"]
