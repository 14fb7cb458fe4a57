"""Helpers, where users of Lightning Fabric look for them."""

from treadle_fabric.attribute_dict import AttributeDict
from treadle_fabric.batches import move_data_to_device
from treadle_fabric.data.samplers import suggested_max_num_workers
from treadle_fabric.measuring import (
    Throughput,
    ThroughputMonitor,
    get_available_flops,
    is_shared_filesystem,
    measure_flops,
)
from treadle_fabric.rank_zero import (
    disable_possible_user_warnings,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from treadle_fabric.utilities.enums import LightningEnum

__all__ = [
    "AttributeDict",
    "LightningEnum",
    "Throughput",
    "ThroughputMonitor",
    "disable_possible_user_warnings",
    "get_available_flops",
    "is_shared_filesystem",
    "measure_flops",
    "move_data_to_device",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "suggested_max_num_workers",
]
