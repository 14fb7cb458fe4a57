"""The hooks of modules and data modules, where users of a trainer look for them."""

from treadle.module.hooks import CheckpointHooks, DataHooks
from treadle.module.hooks import ModuleHooks as ModelHooks

__all__ = ["CheckpointHooks", "DataHooks", "ModelHooks"]
