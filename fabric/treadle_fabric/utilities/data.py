"""What is known of loaders, where users of Lightning Fabric look for it."""

from treadle_fabric.attribute_dict import AttributeDict
from treadle_fabric.data.samplers import has_iterable_dataset, has_len, set_epoch, sized_len, suggested_max_num_workers
from treadle_fabric.launchers.launcher import usable_cores

__all__ = ["AttributeDict", "has_iterable_dataset", "has_len", "sized_len", "suggested_max_num_workers"]

_num_cpus_available = usable_cores
_set_sampler_epoch = set_epoch
