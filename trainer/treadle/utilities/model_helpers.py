"""What reads a module's class, where users of a trainer look for it."""

from typing import TYPE_CHECKING

from treadle.run.dispatch import is_overridden
from treadle_fabric import on_demand

__all__ = ["is_overridden"]

if not TYPE_CHECKING:
    __getattr__ = on_demand(__name__, {"get_torchvision_model": "treadle.demos.torchvision_models"})
