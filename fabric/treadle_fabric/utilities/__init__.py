"""Helpers, where users of Lightning Fabric look for them."""

from typing import TYPE_CHECKING

from treadle_fabric.attribute_dict import AttributeDict
from treadle_fabric.batches import move_data_to_device
from treadle_fabric.errors import not_yet
from treadle_fabric.rank_zero import rank_zero_deprecation, rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = [
    "AttributeDict",
    "move_data_to_device",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = not_yet(
        __name__,
        {
            "LightningEnum",
            "Throughput",
            "ThroughputMonitor",
            "disable_possible_user_warnings",
            "is_shared_filesystem",
            "measure_flops",
            "suggested_max_num_workers",
        },
    )
