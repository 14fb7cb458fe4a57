"""The wrappers at the path of ``lightning.fabric.wrappers``."""

from treadle_fabric.data import FabricDataLoader
from treadle_fabric.setup import FabricModule, FabricOptimizer, is_wrapped
from treadle_fabric.setup import wrapped as _wrapped

__all__ = ["FabricDataLoader", "FabricModule", "FabricOptimizer", "is_wrapped"]

_FabricDataLoader = FabricDataLoader
_FabricModule = FabricModule
_FabricOptimizer = FabricOptimizer
_unwrap_objects = _wrapped.unwrap_objects
