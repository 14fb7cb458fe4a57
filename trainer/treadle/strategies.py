"""Strategies, where users of a trainer look for them."""

from typing import TYPE_CHECKING

from treadle_fabric import on_demand
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
    )
