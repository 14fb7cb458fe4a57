"""Where checkpoints are stored, and how."""

from treadle_fabric.checkpoint.io import CheckpointIO
from treadle_fabric.checkpoint.torch_file import TorchCheckpointIO

__all__ = ["CheckpointIO", "TorchCheckpointIO"]
