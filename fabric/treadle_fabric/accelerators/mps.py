"""The GPU of a Mac."""

from __future__ import annotations

from typing import Any

import torch

from treadle_fabric.accelerators.accelerator import Accelerator, Devices, parse_indices
from treadle_fabric.errors import DeviceUnavailableError

__all__ = ["MPSAccelerator"]


class MPSAccelerator(Accelerator):
    """Apple's Metal GPU, of which a machine has one."""

    is_gpu = True
    has_process_group = False
    has_float64 = False

    @staticmethod
    def name() -> str:
        return "mps"

    @staticmethod
    def is_available() -> bool:
        return torch.backends.mps.is_available()

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def parse_devices(devices: Devices) -> list[int]:
        return parse_indices(devices, "mps", int(MPSAccelerator.is_available()))

    @staticmethod
    def get_parallel_devices(devices: Devices) -> list[torch.device]:
        return [torch.device("mps", index) for index in MPSAccelerator.parse_devices(devices)]

    def setup_device(self, device: torch.device) -> None:
        if device.type != "mps":
            raise DeviceUnavailableError(f"{device} is no MPS device. Use torch.device('mps', 0).")

    def teardown(self) -> None:
        if torch.backends.mps.is_available():
            torch.mps.empty_cache()

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return the memory that tensors and the driver hold, in bytes."""
        return {
            "mps_allocated_bytes": torch.mps.current_allocated_memory(),
            "mps_driver_allocated_bytes": torch.mps.driver_allocated_memory(),
        }
