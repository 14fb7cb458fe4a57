"""Modules and data modules made from a config; ``making.py`` does it. Imports hyper-parameters only."""

from treadle.module.configured.making import (
    ModuleType,
    class_at,
    instantiate_class,
    instantiate_module,
    is_maker,
    refuse_imports,
)

__all__ = [
    "ModuleType",
    "class_at",
    "instantiate_class",
    "instantiate_module",
    "is_maker",
    "refuse_imports",
]
