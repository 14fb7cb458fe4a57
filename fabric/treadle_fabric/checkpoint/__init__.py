"""Where checkpoints are stored, and how: a file of one process, or a folder of all.

Start with ``io.py``, the interface; ``torch_io.py``, ``distributed_io.py`` and ``asynchronous.py`` implement it. From
the bottom: ``seal.py`` and ``archive.py`` check a file without running anything in it; ``folder/`` has the layout of a
folder and its manifest; ``torch_file.py`` writes and reads one file, ``distributed/`` writes one folder, and
``stored/`` reads it; ``reading.py`` reads the one or the other, and ``newest.py`` lists the checkpoints in a folder.
``per_rank.py`` marks values that each rank has of its own, and ``fingerprint.py`` tells whether ranks have the same
tensor. ``values/`` makes values of any kind plain for a file, and turns them back; ``host/`` is about the memory of the
host. ``export/`` makes files for other programs, and ``zero/`` reads the files of DeepSpeed, whose tensors ``kept.py``
marks in a state. Imports only the foundation.

For those who build a trainer: ``checkpoints_in``, ``newest_good``, ``names_of``, ``written_at``, ``size_of`` and
``read_outline`` look at what is there, ``lies_at`` tells whether anything is, and ``read_quickly`` does not check it;
``put_in_place`` and ``link_folder`` give names, ``copy_to_disk`` copies where there are no links, ``hidden_beside``
and ``shortened`` make them; ``raise_together`` has ranks fail together; ``files_mapped`` and ``FileMaps`` have the
processes of a host share what they read, and ``noting_checks``, ``trusting`` and ``check_share`` the check of it;
``PerRank``, ``parts_on_demand`` and ``fingerprint`` are for what the ranks do not have in common;
``tensors_on_demand``, ``fill`` and ``region`` have each rank read its part, and ``in_memory`` all of a tensor;
``pack`` and ``unpack`` are for values of any kind, ``pickled_in`` says which of them are pickled, ``find_moved`` has
pickles find classes that were moved, and ``state_of`` gives the state of an object. In ``kept_by_engines`` a state is
made for a save.
"""

from typing import TYPE_CHECKING

from treadle_fabric.checkpoint.asynchronous import AsyncCheckpointIO
from treadle_fabric.checkpoint.distributed.ranks import raise_together
from treadle_fabric.checkpoint.distributed.split import is_sharded_tensor, own_part, sharded_like
from treadle_fabric.checkpoint.distributed_io import DistributedCheckpointIO
from treadle_fabric.checkpoint.fingerprint import fingerprint
from treadle_fabric.checkpoint.folder.layout import size_of
from treadle_fabric.checkpoint.folder.names import NAME_BYTES, hidden_beside, shortened
from treadle_fabric.checkpoint.folder.placing import copy_to_disk, link_folder, put_in_place
from treadle_fabric.checkpoint.host.checked import noting_checks, trusting
from treadle_fabric.checkpoint.host.mapping import FileMaps, files_mapped
from treadle_fabric.checkpoint.io import CheckpointIO
from treadle_fabric.checkpoint.newest import checkpoints_in, names_of, newest_good, remote_checkpoints_in, written_at
from treadle_fabric.checkpoint.per_rank import PerRank, parts_on_demand
from treadle_fabric.checkpoint.reading import check_share, lies_at, read_outline, read_quickly
from treadle_fabric.checkpoint.stored.regions import fill, placed_like, region
from treadle_fabric.checkpoint.stored.tensor import StoredTensor, in_memory, tensors_on_demand
from treadle_fabric.checkpoint.torch_io import TorchCheckpointIO
from treadle_fabric.checkpoint.values.kept import kept_by_engines
from treadle_fabric.checkpoint.values.moved import PICKLE, Absent, absent, absent_allowed, find_moved
from treadle_fabric.checkpoint.values.not_loaded import NotLoaded, error_of
from treadle_fabric.checkpoint.values.packing import Keeping, pack
from treadle_fabric.checkpoint.values.states import state_of
from treadle_fabric.checkpoint.values.structures import classes_in_state, known_classes
from treadle_fabric.checkpoint.values.unpacking import pickled_in, unpack
from treadle_fabric.checks import on_demand

if TYPE_CHECKING:
    from treadle_fabric.checkpoint.export.consolidate import consolidate
    from treadle_fabric.checkpoint.export.exporting import ExportingCheckpointIO
    from treadle_fabric.checkpoint.host.xla_io import XLACheckpointIO
    from treadle_fabric.checkpoint.zero.converting import convert_zero_checkpoint_to_fp32_state_dict

__all__ = [
    "NAME_BYTES",
    "PICKLE",
    "Absent",
    "AsyncCheckpointIO",
    "CheckpointIO",
    "DistributedCheckpointIO",
    "ExportingCheckpointIO",
    "FileMaps",
    "Keeping",
    "NotLoaded",
    "PerRank",
    "StoredTensor",
    "TorchCheckpointIO",
    "XLACheckpointIO",
    "absent",
    "absent_allowed",
    "check_share",
    "checkpoints_in",
    "classes_in_state",
    "consolidate",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "copy_to_disk",
    "error_of",
    "files_mapped",
    "fill",
    "find_moved",
    "fingerprint",
    "hidden_beside",
    "in_memory",
    "is_sharded_tensor",
    "kept_by_engines",
    "known_classes",
    "lies_at",
    "link_folder",
    "names_of",
    "newest_good",
    "noting_checks",
    "own_part",
    "pack",
    "parts_on_demand",
    "pickled_in",
    "placed_like",
    "put_in_place",
    "raise_together",
    "read_outline",
    "read_quickly",
    "region",
    "remote_checkpoints_in",
    "sharded_like",
    "shortened",
    "size_of",
    "state_of",
    "tensors_on_demand",
    "trusting",
    "unpack",
    "written_at",
]

if not TYPE_CHECKING:
    __getattr__ = on_demand(  # few programs use one of these
        __name__,
        {
            "ExportingCheckpointIO": "treadle_fabric.checkpoint.export.exporting",
            "XLACheckpointIO": "treadle_fabric.checkpoint.host.xla_io",
            "consolidate": "treadle_fabric.checkpoint.export.consolidate",
            "convert_zero_checkpoint_to_fp32_state_dict": "treadle_fabric.checkpoint.zero.converting",
        },
    )
