"""Checkpoint IO, where users of a trainer look for it."""

from typing import TYPE_CHECKING

from treadle_fabric import not_yet
from treadle_fabric.checkpoint import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO

__all__ = ["AsyncCheckpointIO", "CheckpointIO", "TorchCheckpointIO"]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = not_yet(__name__, {"XLACheckpointIO"})
