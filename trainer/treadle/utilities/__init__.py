"""Helpers, where users of a trainer look for them; each submodule is at the path of Lightning's."""

from typing import TYPE_CHECKING

from treadle.module.shared_parameters import find_shared_parameters, set_shared_parameters
from treadle.numbers.grad_norm import grad_norm
from treadle.utilities.enums import GradClipAlgorithmType, LightningEnum
from treadle_fabric import (
    AttributeDict,
    disable_possible_user_warnings,
    is_picklable,
    isolate_rng,
    move_data_to_device,
    on_demand,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from treadle_fabric.data import CombinedLoader, suggested_max_num_workers
from treadle_fabric.measuring import is_shared_filesystem, measure_flops

if TYPE_CHECKING:
    from treadle.utilities import combined_loader as combined_loader
    from treadle.utilities import compile as compile
    from treadle.utilities import data as data
    from treadle.utilities import deepspeed as deepspeed
    from treadle.utilities import exceptions as exceptions
    from treadle.utilities import grads as grads
    from treadle.utilities import imports as imports
    from treadle.utilities import memory as memory
    from treadle.utilities import model_helpers as model_helpers
    from treadle.utilities import model_summary as model_summary
    from treadle.utilities import parameter_tying as parameter_tying
    from treadle.utilities import parsing as parsing
    from treadle.utilities import rank_zero as rank_zero
    from treadle.utilities import seed as seed
    from treadle.utilities import signature_utils as signature_utils
    from treadle.utilities import testing as testing
    from treadle.utilities import types as types
    from treadle.utilities import warnings as warnings

__all__ = [
    "FLOAT16_EPSILON",
    "FLOAT32_EPSILON",
    "FLOAT64_EPSILON",
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

FLOAT16_EPSILON = 2.0**-10
FLOAT32_EPSILON = 2.0**-23
FLOAT64_EPSILON = 2.0**-52

if not TYPE_CHECKING:
    __getattr__ = on_demand(
        __name__,
        {},
        submodules=(
            "combined_loader",
            "compile",
            "data",
            "deepspeed",
            "exceptions",
            "grads",
            "imports",
            "memory",
            "model_helpers",
            "model_summary",
            "parameter_tying",
            "parsing",
            "rank_zero",
            "seed",
            "signature_utils",
            "testing",
            "types",
            "warnings",
        ),
    )
