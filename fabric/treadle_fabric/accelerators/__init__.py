"""Accelerators: the hardware behind one small interface.

Start with ``accelerator.py``, the base class. ``registry.py`` finds accelerators by name, ``memory.py`` tells when
memory ran out, ``gpus.py`` reads requests for GPUs of either kind, ``requirements.py`` tells tests what is not here;
every other file is one kind of hardware. Imports only the foundation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treadle_fabric.accelerators.accelerator import Accelerator, Devices, count_devices, with_index
from treadle_fabric.accelerators.cpu import CPUAccelerator
from treadle_fabric.accelerators.cuda import CUDAAccelerator, find_usable_cuda_devices
from treadle_fabric.accelerators.memory import (
    garbage_collection_cuda,
    is_cuda_out_of_memory,
    is_cudnn_snafu,
    is_oom_error,
    is_out_of_cpu_memory,
    recursive_detach,
)
from treadle_fabric.accelerators.mps import MPSAccelerator
from treadle_fabric.accelerators.registry import ACCELERATOR_REGISTRY, AcceleratorRegistry
from treadle_fabric.checks import on_demand

if TYPE_CHECKING:
    from treadle_fabric.accelerators.xla import XLAAccelerator

__all__ = [
    "ACCELERATOR_REGISTRY",
    "Accelerator",
    "AcceleratorRegistry",
    "CPUAccelerator",
    "CUDAAccelerator",
    "Devices",
    "MPSAccelerator",
    "XLAAccelerator",
    "count_devices",
    "find_usable_cuda_devices",
    "garbage_collection_cuda",
    "is_cuda_out_of_memory",
    "is_cudnn_snafu",
    "is_oom_error",
    "is_out_of_cpu_memory",
    "recursive_detach",
    "with_index",
]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = on_demand(__name__, {"XLAAccelerator": "treadle_fabric.accelerators.xla"})
