"""The CPU as an accelerator."""

from __future__ import annotations

import torch

from treadle_fabric.accelerators.accelerator import Accelerator, parse_count
from treadle_fabric.checks import is_several, one_or_several, require_package
from treadle_fabric.errors import DeviceUnavailableError

__all__ = ["CPUAccelerator"]


class CPUAccelerator(Accelerator):
    """The CPU. ``devices`` is the number of processes; ``"auto"`` is one process, which uses all cores."""

    @staticmethod
    def name() -> str:
        return "cpu"

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def parse_devices(devices: int | str) -> int:
        if devices in ("auto", -1, "-1"):
            return 1
        if is_several(devices) or (isinstance(devices, str) and "," in devices):
            count = devices.count(",") + 1 if isinstance(devices, str) else len(one_or_several(devices))
            raise DeviceUnavailableError(
                f"devices={devices!r} lists indices, but there is one CPU and accelerator='cpu' takes a number of "
                f"processes. Use devices={max(count, 1)}."
            )
        return parse_count(devices, "cpu")

    @staticmethod
    def get_parallel_devices(devices: int | str) -> list[torch.device]:
        return [torch.device("cpu")] * CPUAccelerator.parse_devices(devices)

    def setup_device(self, device: torch.device) -> None:
        if device.type != "cpu":
            raise DeviceUnavailableError(f"{device} is no CPU device. Use torch.device('cpu').")

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, float]:
        """Return load and used memory in per cent.

        Raises:
            MissingPackageError: psutil is not installed.
        """
        require_package("psutil", "Reading the load of the CPU", "trainer")
        import psutil  # an extra

        return {
            "cpu_vm_percent": psutil.virtual_memory().percent,
            "cpu_percent": psutil.cpu_percent(),
            "cpu_swap_percent": psutil.swap_memory().percent,
        }
