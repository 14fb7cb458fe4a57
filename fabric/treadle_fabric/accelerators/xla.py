"""TPUs, and whatever else torch-xla reaches through PJRT."""

from __future__ import annotations

import glob
import importlib.util
import os
from typing import Any, Final

import torch

from treadle_fabric.accelerators.accelerator import Accelerator, Devices, parse_count, parse_indices
from treadle_fabric.checks import require_package
from treadle_fabric.errors import DeviceUnavailableError

__all__ = ["XLAAccelerator"]

_GOOGLE: Final = "0x1ae0"  # the vendor's number on the PCI bus


class XLAAccelerator(Accelerator):
    """A TPU, by torch-xla's PJRT runtime: ``accelerator="tpu"``. Each process has one device, and calls it ``xla:0``.

    ``PJRT_DEVICE`` names another device of PJRT; with ``PJRT_DEVICE=CPU`` the host plays the TPU, for tests.

    Raises:
        MissingPackageError: torch-xla is not installed.
    """

    has_float64 = False
    device_type = "xla"
    automatic_strategies = ("single_xla", "xla")
    has_own_strategies = True

    def __init__(self) -> None:
        self.check_installed()

    @staticmethod
    def name() -> str:
        return "tpu"

    @staticmethod
    def check_installed() -> None:
        require_package("torch_xla", "accelerator='tpu'", "xla", "Its last release, 2.9, goes with torch 2.9.")

    @staticmethod
    def is_available() -> bool:
        return importlib.util.find_spec("torch_xla") is not None and _count() > 0

    @staticmethod
    def is_emulated() -> bool:
        return _pjrt_device() == "CPU"

    @staticmethod
    def auto_device_count() -> int:
        return _count()

    @staticmethod
    def parse_devices(devices: Devices) -> int | list[int]:
        """Return the number of devices, or a list with the index of one."""
        if _pjrt_device() == "CPU" and devices not in ("auto", -1, "-1") and not _lists(devices):
            return parse_count(devices, "tpu")  # the host plays any number of devices
        indices = parse_indices(devices, "tpu", _count())
        return indices if _lists(devices) and len(indices) == 1 else len(indices)

    @staticmethod
    def get_parallel_devices(devices: Devices) -> list[torch.device]:
        """Return ``xla:0`` for each process, which sees its own device only, or a device of this process by index."""
        parsed = XLAAccelerator.parse_devices(devices)
        if isinstance(parsed, int):
            return [torch.device("xla", 0)] * parsed
        return [torch.device("xla", index) for index in parsed]

    def setup_device(self, device: torch.device) -> None:
        if device.type != "xla":
            raise DeviceUnavailableError(f"{device} is no device of XLA. Use torch.device('xla', 0).")
        import torch_xla  # an extra
        import torch_xla.core.xla_model as xm

        first = not torch_xla._XLAC._xla_runtime_is_initialized()
        torch_xla._XLAC._xla_set_default_device(str(device))
        if first:  # torch's seed does not reach it
            xm.set_rng_state(torch.initial_seed() % 2**32)
        try:
            torch.zeros(1, device=device, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "device_ready_queues_" not in str(error):
                raise
            raise DeviceUnavailableError(
                "A backward pass ran in this process before accelerator='tpu' was set up, and torch.autograd has no "
                f"queue for {device} therefore. Set Fabric or the Trainer up first, or call torch_xla.device() at the "
                "begin of the script, or use a new process."
            ) from error

    def teardown(self) -> None:
        """Nothing: the runtime keeps its devices until the process ends."""

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return used and available memory in bytes; nothing where the device does not tell, as the CPU."""
        import torch_xla.core.xla_model as xm  # an extra

        try:
            memory = xm.get_memory_info(
                torch.device("xla", device) if isinstance(device, int) else torch.device(device)
            )
        except RuntimeError:
            return {}
        return {"bytes_used": memory["bytes_used"], "bytes_limit": memory["bytes_limit"]}


def _lists(devices: Any) -> bool:
    return "," in devices if isinstance(devices, str) else not isinstance(devices, int)


def _pjrt_device() -> str:
    return os.environ.get("PJRT_DEVICE", "").split("_")[0].upper()


def _count() -> int:
    """The devices of this machine, by environment variables and the PCI bus: the runtime must not start before a fork.

    torch-xla is imported, for two seconds, only where there is a TPU.
    """
    kind = _pjrt_device()
    if kind == "CPU":
        count = os.environ.get("CPU_NUM_DEVICES", "1")
        return int(count) if count.isdecimal() else 1
    if kind not in ("", "TPU"):
        return 1
    if not any(_is_google(path) for path in glob.glob("/sys/bus/pci/devices/*/vendor")):
        return 0
    from torch_xla._internal import tpu  # an extra

    return int(tpu.num_local_processes())


def _is_google(path: str) -> bool:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip() == _GOOGLE
    except OSError:
        return False
