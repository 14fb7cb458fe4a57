"""Strategies, where users of a trainer look for them.

Every name is a re-export of ``treadle_fabric.strategies``; ``StrategyRegistry`` has the names of strategies.
"""

from typing import TYPE_CHECKING

from treadle_fabric import on_demand
from treadle_fabric.strategies import STRATEGY_REGISTRY as StrategyRegistry
from treadle_fabric.strategies import (
    DDPStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

if TYPE_CHECKING:
    from treadle_fabric.strategies import (
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        SingleDeviceXLAStrategy,
        XLAFSDPStrategy,
        XLAStrategy,
    )

__all__ = [
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "SingleDeviceXLAStrategy",
    "Strategy",
    "StrategyRegistry",
    "XLAFSDPStrategy",
    "XLAStrategy",
]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = on_demand(
        __name__,
        dict.fromkeys(
            (
                "DeepSpeedStrategy",
                "FSDPStrategy",
                "ModelParallelStrategy",
                "SingleDeviceXLAStrategy",
                "XLAFSDPStrategy",
                "XLAStrategy",
            ),
            "treadle_fabric.strategies",
        ),
        submodules=(
            "ddp",
            "deepspeed",
            "fsdp",
            "model_parallel",
            "parallel",
            "single_device",
            "single_xla",
            "strategy",
            "xla",
        ),
    )
