"""The command ``treadle``. Start with ``main.py``; each other file is one sub-command."""

from typing import TYPE_CHECKING

from treadle.cli.main import main
from treadle_fabric import not_yet

__all__ = ["main"]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = not_yet(
        __name__,
        {
            "LightningArgumentParser",
            "LightningCLI",
            "ModuleType",
            "SaveConfigCallback",
            "instantiate_class",
            "instantiate_module",
        },
    )
