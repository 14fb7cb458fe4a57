"""Checkpoints that are read where they are used, where users of Lightning Fabric look for them."""

from treadle_fabric.checkpoint.stored import lazy, tensor

__all__: list[str] = []

_NotYetLoadedTensor = tensor.StoredTensor
_lazy_load = lazy.load_lazily
_load_distributed_checkpoint = lazy.load_whole_folder
_materialize_tensors = tensor.in_memory
_move_state_into = lazy.move_state
