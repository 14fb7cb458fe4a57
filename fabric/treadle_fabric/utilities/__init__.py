"""Helpers, where users of Lightning Fabric look for them; each submodule is at the path of Lightning's."""

from typing import TYPE_CHECKING

from treadle_fabric.attribute_dict import AttributeDict
from treadle_fabric.batches import move_data_to_device
from treadle_fabric.checks import on_demand
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

if TYPE_CHECKING:
    from treadle_fabric.utilities import apply_func as apply_func
    from treadle_fabric.utilities import cloud_io as cloud_io
    from treadle_fabric.utilities import data as data
    from treadle_fabric.utilities import device_dtype_mixin as device_dtype_mixin
    from treadle_fabric.utilities import device_parser as device_parser
    from treadle_fabric.utilities import distributed as distributed
    from treadle_fabric.utilities import exceptions as exceptions
    from treadle_fabric.utilities import imports as imports
    from treadle_fabric.utilities import init as init
    from treadle_fabric.utilities import load as load
    from treadle_fabric.utilities import logger as logger
    from treadle_fabric.utilities import optimizer as optimizer
    from treadle_fabric.utilities import rank_zero as rank_zero
    from treadle_fabric.utilities import seed as seed
    from treadle_fabric.utilities import spike as spike
    from treadle_fabric.utilities import testing as testing
    from treadle_fabric.utilities import throughput as throughput
    from treadle_fabric.utilities import types as types
    from treadle_fabric.utilities import warnings as warnings
    from treadle_fabric.utilities.testing import missing_here

__all__ = [
    "AttributeDict",
    "LightningEnum",
    "Throughput",
    "ThroughputMonitor",
    "disable_possible_user_warnings",
    "get_available_flops",
    "is_shared_filesystem",
    "measure_flops",
    "missing_here",
    "move_data_to_device",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "suggested_max_num_workers",
]

if not TYPE_CHECKING:
    __getattr__ = on_demand(
        __name__,
        {"missing_here": "treadle_fabric.utilities.testing"},
        submodules=(
            "apply_func",
            "cloud_io",
            "data",
            "device_dtype_mixin",
            "device_parser",
            "distributed",
            "exceptions",
            "imports",
            "init",
            "load",
            "logger",
            "optimizer",
            "rank_zero",
            "seed",
            "spike",
            "testing",
            "throughput",
            "types",
            "warnings",
        ),
    )
