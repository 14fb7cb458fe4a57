"""Where checkpoints are stored, and how: a file of one process, or a folder of all.

Start with ``io.py``, the interface. ``torch_file.py`` writes and reads one file, ``distributed/`` a folder whose layout
is in ``folder/``. ``seal.py`` makes every byte of a file count, ``archive.py`` finds out what a file is without running
anything in it, ``newest.py`` finds the newest checkpoint that is whole, and ``asynchronous.py`` writes while training
goes on. Imports only the foundation.
"""

from treadle_fabric.checkpoint.asynchronous import AsyncCheckpointIO
from treadle_fabric.checkpoint.distributed_io import DistributedCheckpointIO
from treadle_fabric.checkpoint.fingerprint import fingerprint
from treadle_fabric.checkpoint.folder import link_folder, put_in_place, size_of
from treadle_fabric.checkpoint.io import CheckpointIO
from treadle_fabric.checkpoint.newest import checkpoints_in, names_of, newest_good, written_at
from treadle_fabric.checkpoint.per_rank import PerRank, parts_on_demand
from treadle_fabric.checkpoint.reading import read_outline
from treadle_fabric.checkpoint.torch_io import TorchCheckpointIO

__all__ = [
    "AsyncCheckpointIO",
    "CheckpointIO",
    "DistributedCheckpointIO",
    "PerRank",
    "TorchCheckpointIO",
    "checkpoints_in",
    "fingerprint",
    "link_folder",
    "names_of",
    "newest_good",
    "parts_on_demand",
    "put_in_place",
    "read_outline",
    "size_of",
    "written_at",
]
