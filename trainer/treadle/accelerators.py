"""Accelerators, where users of a trainer look for them."""

from typing import TYPE_CHECKING

from treadle_fabric import on_demand
from treadle_fabric.accelerators import ACCELERATOR_REGISTRY as AcceleratorRegistry
from treadle_fabric.accelerators import (
    Accelerator,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
    find_usable_cuda_devices,
)

if TYPE_CHECKING:
    from treadle_fabric.accelerators import XLAAccelerator

__all__ = [
    "Accelerator",
    "AcceleratorRegistry",
    "CPUAccelerator",
    "CUDAAccelerator",
    "MPSAccelerator",
    "XLAAccelerator",
    "find_usable_cuda_devices",
]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = on_demand(__name__, {"XLAAccelerator": "treadle_fabric.accelerators"})
