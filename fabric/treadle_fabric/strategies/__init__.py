"""Strategies: how a model is placed on devices and processes, and the names they go by.

Start with ``strategy.py``, the base class, and ``capabilities.py``, what strategies declare. ``parallel.py``,
``native_step.py`` and those in ``states/`` are bases for one subject each. The strategies are
``single_device.py``, ``ddp.py``, ``fsdp.py``, ``model_parallel.py``, ``deepspeed.py``, ``single_xla.py``, ``xla.py``
and ``xla_fsdp.py``; their parts are in ``data_parallel/``, ``sharding/``, ``parallelism/``, ``zero/`` and ``on_xla/``.
``registry.py`` has their names, ``reduction.py`` says what a reduction makes of each dtype, and ``unwrapping.py`` what
the user's module is inside of wrappers.
Imports launchers, precision and what is below them.
"""

import functools
import sys
from typing import TYPE_CHECKING, Any

from treadle_fabric.checks import on_demand
from treadle_fabric.errors import left_out
from treadle_fabric.strategies.ddp import DDPStrategy
from treadle_fabric.strategies.native_step import NativeStepStrategy
from treadle_fabric.strategies.on_xla.stored import as_part, from_part
from treadle_fabric.strategies.parallel import ParallelStrategy
from treadle_fabric.strategies.parts import (
    METHOD_KEYWORD,
    Parts,
    Plugin,
    elements_here,
    elements_of,
    own_groups,
)
from treadle_fabric.strategies.reduction import check_reduce_op, reduction_of
from treadle_fabric.strategies.registry import STRATEGY_REGISTRY, StrategyRegistry
from treadle_fabric.strategies.sharding.norms import is_elsewhere, local_gradients, norms, total_norm
from treadle_fabric.strategies.single_device import SingleDeviceStrategy
from treadle_fabric.strategies.states.checkpointing import CheckpointingStrategy
from treadle_fabric.strategies.states.elsewhere import stand_in
from treadle_fabric.strategies.states.whole_state import WholeStateStrategy
from treadle_fabric.strategies.strategy import Strategy
from treadle_fabric.strategies.unwrapping import load_module_state, module_state, user_module, with_plain_names

if TYPE_CHECKING:
    from treadle_fabric.strategies.deepspeed import DeepSpeedStrategy
    from treadle_fabric.strategies.fsdp import FSDPStrategy
    from treadle_fabric.strategies.model_parallel import ModelParallelStrategy
    from treadle_fabric.strategies.parallelism.loss import sharded_cross_entropy
    from treadle_fabric.strategies.parallelism.plans import apply_tensor_parallel
    from treadle_fabric.strategies.parallelism.sequence import (
        local_attention,
        sequence_attention,
        sequence_offset,
        split_sequence,
    )
    from treadle_fabric.strategies.single_xla import SingleDeviceXLAStrategy
    from treadle_fabric.strategies.xla import XLAStrategy
    from treadle_fabric.strategies.xla_fsdp import XLAFSDPStrategy

__all__ = [
    "METHOD_KEYWORD",
    "STRATEGY_REGISTRY",
    "CheckpointingStrategy",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "NativeStepStrategy",
    "ParallelStrategy",
    "Parts",
    "Plugin",
    "SingleDeviceStrategy",
    "SingleDeviceXLAStrategy",
    "Strategy",
    "StrategyRegistry",
    "WholeStateStrategy",
    "XLAFSDPStrategy",
    "XLAStrategy",
    "apply_tensor_parallel",
    "as_part",
    "check_reduce_op",
    "elements_here",
    "elements_of",
    "from_part",
    "is_elsewhere",
    "load_module_state",
    "local_attention",
    "local_gradients",
    "module_state",
    "norms",
    "own_groups",
    "reduction_of",
    "sequence_attention",
    "sequence_offset",
    "sharded_cross_entropy",
    "split_sequence",
    "stand_in",
    "total_norm",
    "user_module",
    "with_plain_names",
]

for _strategy in (SingleDeviceStrategy, DDPStrategy):
    _strategy.register_strategies(STRATEGY_REGISTRY)


def _find(kind: str) -> type[Strategy]:
    strategy: type[Strategy] = getattr(sys.modules[__name__], kind)  # which is imported on demand
    return strategy


_OFFLOADED: dict[str, Any] = {"offload_optimizer": True, "offload_parameters": True}
_ON_DISK = {"remote_device": "nvme", "offload_params_device": "nvme", "offload_optimizer_device": "nvme"}
_NAMES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("fsdp", "FSDPStrategy", "Fully sharded data parallelism", {}),
    ("fsdp_cpu_offload", "FSDPStrategy", "Fully sharded data parallelism, parts on the host", {"cpu_offload": True}),
    ("single_xla", "SingleDeviceXLAStrategy", "One process, one device of XLA", {}),
    ("xla", "XLAStrategy", "Data parallelism on devices of XLA", {}),
    ("xla_fsdp", "XLAFSDPStrategy", "Fully sharded data parallelism on devices of XLA", {}),
    ("deepspeed", "DeepSpeedStrategy", "ZeRO on DeepSpeed: stage 2, or what the config says", {}),
    *(
        (f"deepspeed_stage_{stage}", "DeepSpeedStrategy", f"Stage {stage} of ZeRO on DeepSpeed", {"stage": stage})
        for stage in (1, 2, 3)
    ),
    *(
        (
            f"deepspeed_stage_{stage}_offload",
            "DeepSpeedStrategy",
            f"Stage {stage} of ZeRO on DeepSpeed, what is not computed with on the host",
            {"stage": stage, **(_OFFLOADED if stage == 3 else {"offload_optimizer": True})},
        )
        for stage in (1, 2, 3)
    ),
    (
        "deepspeed_stage_3_offload_nvme",
        "DeepSpeedStrategy",
        "Stage 3 of ZeRO on DeepSpeed, what is not computed with on a disk",
        {**_OFFLOADED, **_ON_DISK, "stage": 3},
    ),
]
for _name, _kind, _description, _arguments in _NAMES:
    STRATEGY_REGISTRY.register_on_demand(_name, functools.partial(_find, _kind), _description, **_arguments)

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = left_out(
        __name__,
        {"DataParallelStrategy": "use strategy='ddp', which is faster on one machine, too."},
        otherwise=on_demand(  # most programs shard nothing
            __name__,
            {
                "DeepSpeedStrategy": "treadle_fabric.strategies.deepspeed",
                "FSDPStrategy": "treadle_fabric.strategies.fsdp",
                "ModelParallelStrategy": "treadle_fabric.strategies.model_parallel",
                "SingleDeviceXLAStrategy": "treadle_fabric.strategies.single_xla",
                "XLAFSDPStrategy": "treadle_fabric.strategies.xla_fsdp",
                "XLAStrategy": "treadle_fabric.strategies.xla",
                "apply_tensor_parallel": "treadle_fabric.strategies.parallelism.plans",
                "local_attention": "treadle_fabric.strategies.parallelism.sequence",
                "sequence_attention": "treadle_fabric.strategies.parallelism.sequence",
                "sequence_offset": "treadle_fabric.strategies.parallelism.sequence",
                "sharded_cross_entropy": "treadle_fabric.strategies.parallelism.loss",
                "split_sequence": "treadle_fabric.strategies.parallelism.sequence",
            },
        ),
    )
