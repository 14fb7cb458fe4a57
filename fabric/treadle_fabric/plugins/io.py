"""Checkpoint IO, where users of Lightning Fabric look for it."""

from typing import TYPE_CHECKING

from treadle_fabric.checkpoint import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from treadle_fabric.checks import on_demand

if TYPE_CHECKING:
    from treadle_fabric.checkpoint import XLACheckpointIO

__all__ = ["AsyncCheckpointIO", "CheckpointIO", "TorchCheckpointIO", "XLACheckpointIO"]

if not TYPE_CHECKING:
    __getattr__ = on_demand(__name__, {"XLACheckpointIO": "treadle_fabric.checkpoint"})
