"""The wrappers at the path of ``lightning.fabric.wrappers``."""

from __future__ import annotations

from typing import Any

from treadle_fabric.containers import map_leaves
from treadle_fabric.data import FabricDataLoader
from treadle_fabric.data.loader import WrappedLoader
from treadle_fabric.setup import FabricModule, FabricOptimizer, engine_of, is_wrapped
from treadle_fabric.setup.wrapped import given_module

__all__ = [
    "FabricDataLoader",
    "FabricModule",
    "FabricOptimizer",
    "_FabricDataLoader",
    "_FabricModule",
    "_FabricOptimizer",
    "_unwrap_objects",
    "is_wrapped",
]

_FabricDataLoader = FabricDataLoader
_FabricModule = FabricModule
_FabricOptimizer = FabricOptimizer


def _unwrap_objects(collection: Any) -> Any:
    """Replace what ``setup`` and ``setup_dataloaders`` returned by engines, optimizers and loaders, in containers."""
    return map_leaves(collection, _unwrapped, is_wrapped)


def _unwrapped(wrapper: Any) -> Any:
    if isinstance(wrapper, WrappedLoader):
        return wrapper.dataloader
    return wrapper.optimizer if isinstance(wrapper, FabricOptimizer) else engine_of(given_module(wrapper))
