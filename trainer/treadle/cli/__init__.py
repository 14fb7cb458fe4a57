"""The command ``treadle``, and the command lines of users' own training programs.

Start with ``main.py`` for the command; each file beside it is one sub-command. ``configured/`` is for programs:
``LightningCLI``, which reads their arguments and configs. It needs jsonargparse, an extra, so its names are imported
when they are asked for.
"""

from typing import TYPE_CHECKING

from treadle.cli.main import main as main  # no part of `import *`, which would hide a user's own
from treadle.module.configured import ModuleType, instantiate_class, instantiate_module
from treadle_fabric import on_demand

if TYPE_CHECKING:
    from treadle.cli.configured import (
        ArgsType,
        LightningArgumentParser,
        LightningCLI,
        LRSchedulerCallable,
        LRSchedulerTypeTuple,
        LRSchedulerTypeUnion,
        OptimizerCallable,
        ReduceLROnPlateau,
        SaveConfigCallback,
    )

__all__ = [
    "ArgsType",
    "LRSchedulerCallable",
    "LRSchedulerTypeTuple",
    "LRSchedulerTypeUnion",
    "LightningArgumentParser",
    "LightningCLI",
    "ModuleType",
    "OptimizerCallable",
    "ReduceLROnPlateau",
    "SaveConfigCallback",
    "instantiate_class",
    "instantiate_module",
]


if not TYPE_CHECKING:  # which tell of any other name
    _parsing = [name for name in __all__ if name not in globals()]
    __getattr__ = on_demand(__name__, dict.fromkeys(_parsing, "treadle.cli.configured"), "jsonargparse", "cli")
