"""Helpers, where users of a trainer look for them."""

from typing import TYPE_CHECKING

from treadle.module.shared_parameters import find_shared_parameters, set_shared_parameters
from treadle.numbers.grad_norm import grad_norm
from treadle_fabric import (
    AttributeDict,
    move_data_to_device,
    not_yet,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from treadle_fabric.data import CombinedLoader

__all__ = [
    "AttributeDict",
    "CombinedLoader",
    "find_shared_parameters",
    "grad_norm",
    "move_data_to_device",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "set_shared_parameters",
]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = not_yet(
        __name__,
        {
            "GradClipAlgorithmType",
            "LightningEnum",
            "disable_possible_user_warnings",
            "is_picklable",
            "is_shared_filesystem",
            "measure_flops",
            "suggested_max_num_workers",
        },
    )
