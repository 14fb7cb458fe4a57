"""Helpers, where users of a trainer look for them."""

from treadle.module.shared_parameters import find_shared_parameters, set_shared_parameters
from treadle.numbers.grad_norm import grad_norm
from treadle.utilities.enums import GradClipAlgorithmType, LightningEnum
from treadle_fabric import (
    AttributeDict,
    disable_possible_user_warnings,
    is_picklable,
    isolate_rng,
    move_data_to_device,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from treadle_fabric.data import CombinedLoader, suggested_max_num_workers
from treadle_fabric.measuring import is_shared_filesystem, measure_flops

__all__ = [
    "AttributeDict",
    "CombinedLoader",
    "GradClipAlgorithmType",
    "LightningEnum",
    "disable_possible_user_warnings",
    "find_shared_parameters",
    "grad_norm",
    "is_picklable",
    "is_shared_filesystem",
    "isolate_rng",
    "measure_flops",
    "move_data_to_device",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "set_shared_parameters",
    "suggested_max_num_workers",
]
