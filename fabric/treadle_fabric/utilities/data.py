"""What is known of loaders, where users of Lightning Fabric look for it."""

from treadle_fabric.attribute_dict import AttributeDict
from treadle_fabric.data.samplers import has_len, sized_len, suggested_max_num_workers

__all__ = ["AttributeDict", "has_len", "sized_len", "suggested_max_num_workers"]
