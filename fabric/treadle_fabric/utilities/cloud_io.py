"""File systems, and files with a ``torch.save`` in them, where users of Lightning Fabric look for these."""

from treadle_fabric.checkpoint import torch_file
from treadle_fabric.checkpoint.torch_file import get_filesystem

__all__ = ["get_filesystem"]

_atomic_save = torch_file.save_file
_is_dir = torch_file.is_folder
_is_local_file_protocol = torch_file.is_local
_is_object_storage = torch_file.is_object_store
_load = torch_file.load_plain
