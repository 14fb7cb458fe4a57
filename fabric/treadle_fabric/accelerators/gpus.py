"""GPUs of either kind."""

from __future__ import annotations

from typing import Any

from treadle_fabric.accelerators.cuda import CUDAAccelerator
from treadle_fabric.accelerators.mps import MPSAccelerator
from treadle_fabric.errors import MisconfigurationException

__all__ = ["first_gpu", "parse_gpus", "preferred_accelerator"]


def parse_gpus(gpus: Any, include_cuda: bool = False, include_mps: bool = False) -> list[int] | None:
    """Return the indices of GPUs; None where none is asked for: 0, "0" or an empty list.

    Args:
        gpus: A number, -1 for all, a list of indices, or one of these as a string.
        include_cuda: Whether CUDA devices count.
        include_mps: Whether Apple's GPU counts, where there is no CUDA device.

    Raises:
        DeviceUnavailableError: The request is malformed, or names a GPU that is not here.
        MisconfigurationException: Neither kind of GPU counts.
    """
    if not include_cuda and not include_mps:
        raise MisconfigurationException("No kind of GPU counts: pass include_cuda=True, or include_mps=True.")
    if gpus in (0, "0", [], ()) and not isinstance(gpus, bool):
        return None
    if include_cuda and (CUDAAccelerator.is_available() or not include_mps):
        return CUDAAccelerator.parse_devices(gpus)
    return MPSAccelerator.parse_devices(gpus)


def first_gpu(gpus: list[Any] | None) -> Any:
    """Return the first GPU of a list; None without a list."""
    if gpus is None:
        return None
    if not gpus:
        raise MisconfigurationException("The list of GPUs is empty: give it one, or pass None.")
    return gpus[0]


def preferred_accelerator() -> str:
    """The name of the accelerator of ``accelerator="auto"``."""
    if CUDAAccelerator.is_available():
        return "cuda"
    return "mps" if MPSAccelerator.is_available() else "cpu"
