"""Where checkpoints are stored, and how."""

from treadle_fabric.checkpoint.asynchronous import AsyncCheckpointIO
from treadle_fabric.checkpoint.distributed.folder_io import DistributedCheckpointIO
from treadle_fabric.checkpoint.io import CheckpointIO
from treadle_fabric.checkpoint.newest import newest_good
from treadle_fabric.checkpoint.torch_file import TorchCheckpointIO

__all__ = ["AsyncCheckpointIO", "CheckpointIO", "DistributedCheckpointIO", "TorchCheckpointIO", "newest_good"]
