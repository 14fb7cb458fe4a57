"""The command ``treadle``, and the command lines of users' own training programs.

Start with ``main.py`` for the command; each file beside it is one sub-command. ``configured/`` is for programs:
``LightningCLI``, which reads their arguments and configs. It needs jsonargparse, an extra, so its names are imported
when they are asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from treadle.cli.main import main as main  # no part of `import *`, which would hide a user's own

if TYPE_CHECKING:
    from treadle.cli.configured import (
        ArgsType,
        LightningArgumentParser,
        LightningCLI,
        LRSchedulerCallable,
        LRSchedulerTypeTuple,
        LRSchedulerTypeUnion,
        ModuleType,
        OptimizerCallable,
        ReduceLROnPlateau,
        SaveConfigCallback,
        instantiate_class,
        instantiate_module,
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module("treadle.cli.configured")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "treadle":
            raise
        raise ModuleNotFoundError(
            f"treadle.cli.{name} needs the package {error.name!r}, which is not installed: `pip install treadle[cli]`.",
            name=error.name,
        ) from None
    value = globals()[name] = getattr(home, name)
    return value
