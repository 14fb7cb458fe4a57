"""Accelerators, where users of a trainer look for them."""

from typing import TYPE_CHECKING

from treadle_fabric import not_yet
from treadle_fabric.accelerators import (
    Accelerator,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
    find_usable_cuda_devices,
)

__all__ = ["Accelerator", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator", "find_usable_cuda_devices"]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = not_yet(__name__, {"XLAAccelerator"})
