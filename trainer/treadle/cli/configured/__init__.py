"""``LightningCLI``: the command line and the configs of a training program, on jsonargparse.

Start with ``program.py``, what happens when in such a program. ``parser.py`` adds arguments for the Trainer, modules,
optimizers and schedulers; ``optimizers.py`` gives the module those that were chosen; ``objects.py`` makes modules that
remember their config; ``save_config.py`` writes the config beside the logs; ``explain.py`` adds near names to the
parser's errors; ``types.py`` has the types that users annotate with. Everything but ``types.py`` imports jsonargparse.
"""

from treadle.cli.configured.parser import LightningArgumentParser
from treadle.cli.configured.program import LightningCLI
from treadle.cli.configured.save_config import SaveConfigCallback
from treadle.cli.configured.types import (
    ArgsType,
    LRSchedulerCallable,
    LRSchedulerTypeTuple,
    LRSchedulerTypeUnion,
    OptimizerCallable,
    ReduceLROnPlateau,
)
from treadle.module.configured import ModuleType, instantiate_class, instantiate_module

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
