"""Memory that ran out, and memory to free."""

from __future__ import annotations

import gc
from typing import Any, Final

import torch

from treadle_fabric.batches import map_tensors

__all__ = [
    "garbage_collection_cuda",
    "is_cuda_out_of_memory",
    "is_cudnn_snafu",
    "is_oom_error",
    "is_out_of_cpu_memory",
    "recursive_detach",
]


_LIBRARIES: Final = ("CUDNN_STATUS_NOT_SUPPORTED", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
"""Messages of cuDNN and cuBLAS, which find no room for their workspace."""
_HOST: Final = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""Messages of torch's allocator on the CPU, of Linux and Windows."""


def is_oom_error(exception: BaseException | None) -> bool:
    """Return whether an exception, or what has caused it, says that memory ran out, on a device or on the host."""
    while exception is not None:
        if is_cuda_out_of_memory(exception) or is_cudnn_snafu(exception) or is_out_of_cpu_memory(exception):
            return True
        exception = exception.__cause__
    return False


def is_cuda_out_of_memory(exception: BaseException) -> bool:
    """Return whether an exception says that the memory of a device ran out, of CUDA, MPS or XLA."""
    return isinstance(exception, torch.OutOfMemoryError) or _says(exception, ("out of memory",))


def is_cudnn_snafu(exception: BaseException) -> bool:
    """Return whether an exception is one that cuDNN and cuBLAS raise where memory ran out, though it says otherwise."""
    return _says(exception, _LIBRARIES)


def is_out_of_cpu_memory(exception: BaseException) -> bool:
    """Return whether an exception says that the memory of the host ran out."""
    return isinstance(exception, MemoryError) or _says(exception, _HOST)


def _says(exception: BaseException, messages: tuple[str, ...]) -> bool:
    return isinstance(exception, RuntimeError) and any(message in str(exception) for message in messages)


def garbage_collection_cuda() -> None:
    """Collect garbage, and give memory of CUDA and MPS devices that is not used back to the driver."""
    gc.collect()
    try:
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        elif torch.backends.mps.is_available():
            torch.mps.empty_cache()
    except RuntimeError as error:  # an earlier operation may be reported here
        if not is_oom_error(error):
            raise


def recursive_detach(in_dict: Any, to_cpu: bool = False) -> Any:
    """Return a container with all tensors in it detached.

    Args:
        in_dict: A dict, or any other container or batch.
        to_cpu: Whether to copy them to the CPU, too.
    """
    return map_tensors(in_dict, lambda tensor: tensor.detach().cpu() if to_cpu else tensor.detach())
