"""What is about several processes, where users of Lightning Fabric look for it."""

from torch.distributed import ReduceOp, group

from treadle_fabric.data.samplers import DatasetOfSampler, DistributedSamplerWrapper
from treadle_fabric.launchers import launcher
from treadle_fabric.measuring import is_shared_filesystem
from treadle_fabric.strategies import process_group

__all__ = ["DistributedSamplerWrapper", "ReduceOp", "group", "is_shared_filesystem"]

_DatasetSamplerWrapper = DatasetOfSampler
_set_num_threads_if_needed = launcher.limit_threads
_suggested_max_num_threads = launcher.threads_per_process
_InfiniteBarrier = process_group.PatientBarrier
_all_gather_ddp_if_available = process_group.gather_if_distributed
_destroy_dist_connection = process_group.leave_group
_distributed_is_initialized = process_group.in_group
_gather_all_tensors = process_group.gather_unequal
_get_default_process_group_backend_for_device = process_group.backend_for
_init_dist_connection = process_group.join_group
_is_dtensor = process_group.is_dtensor
_sync_ddp = process_group.reduce_tensor
_sync_ddp_if_available = process_group.reduce_if_distributed
