"""NVIDIA GPUs, and AMD's through ROCm."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from treadle_fabric.accelerators.accelerator import Accelerator, Devices, parse_indices
from treadle_fabric.errors import DeviceUnavailableError
from treadle_fabric.rank_zero import rank_zero_info

__all__ = ["CUDAAccelerator", "find_usable_cuda_devices"]


class CUDAAccelerator(Accelerator):
    """CUDA devices. A number takes the first ones, a list takes those with its indices, ``"auto"`` and -1 take all."""

    is_gpu = True
    shares_batch_norm = True

    @staticmethod
    def name() -> str:
        return "cuda"

    @staticmethod
    def is_available() -> bool:
        return torch.cuda.device_count() > 0

    @staticmethod
    def auto_device_count() -> int:
        return torch.cuda.device_count()

    @staticmethod
    def parse_devices(devices: Devices) -> list[int]:
        return parse_indices(devices, "cuda", torch.cuda.device_count())

    @staticmethod
    def get_parallel_devices(devices: Devices) -> list[torch.device]:
        return [torch.device("cuda", index) for index in CUDAAccelerator.parse_devices(devices)]

    def setup_device(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise DeviceUnavailableError(f"{device} is no CUDA device. Use torch.device('cuda', index).")
        torch.cuda.set_device(device)
        _tell_of_tensor_cores(device)

    def teardown(self) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return what ``torch.cuda.memory_stats`` counts, in bytes and numbers of blocks."""
        return torch.cuda.memory_stats(device)


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """Return the indices of GPUs on which this process can make a tensor.

    A GPU that another process uses exclusively is left out.

    Args:
        num_devices: How many to find. Default: -1, all that are usable.

    Raises:
        DeviceUnavailableError: Fewer than ``num_devices`` are usable.
    """
    if num_devices == 0:
        return []
    visible = torch.cuda.device_count()
    if num_devices > visible:
        raise DeviceUnavailableError(
            f"num_devices={num_devices}, but this machine has {visible} CUDA device(s). Ask for fewer, or for -1."
        )
    usable: list[int] = []
    for index in range(visible):
        try:
            torch.zeros(1, device=torch.device("cuda", index))
        except RuntimeError:
            continue
        usable.append(index)
        if len(usable) == num_devices:
            break
    if num_devices > len(usable):
        raise DeviceUnavailableError(
            f"num_devices={num_devices}, but of the {visible} CUDA devices only {usable} can be used; the others are "
            "busy. Ask for fewer, or for -1."
        )
    return usable


@cache
def _tell_of_tensor_cores(device: torch.device) -> None:
    """Say, once a device, that products of float32 matrices could use the tensor cores that the device has."""
    if torch.cuda.get_device_capability(device) >= (8, 0) and torch.get_float32_matmul_precision() == "highest":
        rank_zero_info(
            f"You are using a CUDA device ({torch.cuda.get_device_name(device)!r}) that has Tensor Cores, and products"
            " of float32 matrices do not use them: `torch.set_float32_matmul_precision('high')` is faster, less exact."
        )
