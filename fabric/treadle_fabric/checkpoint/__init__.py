"""Where checkpoints are stored, and how: a file of one process, or a folder of all.

Start with ``io.py``, the interface. ``torch_file.py`` writes and reads one file, ``distributed/`` a folder whose layout
is in ``folder/``. ``seal.py`` makes every byte of a file count, ``archive.py`` finds out what a file is without running
anything in it, ``newest.py`` finds the newest checkpoint that is whole, and ``asynchronous.py`` writes while training
goes on. Imports only the foundation.
"""

from treadle_fabric.checkpoint.asynchronous import AsyncCheckpointIO
from treadle_fabric.checkpoint.distributed.folder_io import DistributedCheckpointIO
from treadle_fabric.checkpoint.folder import bring_back, link_folder, put_in_place, representative, size_of
from treadle_fabric.checkpoint.io import CheckpointIO
from treadle_fabric.checkpoint.newest import checkpoints_in, newest_good, read_outline
from treadle_fabric.checkpoint.torch_file import TorchCheckpointIO

__all__ = [
    "AsyncCheckpointIO",
    "CheckpointIO",
    "DistributedCheckpointIO",
    "TorchCheckpointIO",
    "bring_back",
    "checkpoints_in",
    "link_folder",
    "newest_good",
    "put_in_place",
    "read_outline",
    "representative",
    "size_of",
]
