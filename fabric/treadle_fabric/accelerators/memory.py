"""Memory that ran out, and memory to free."""

from __future__ import annotations

import gc
from typing import Any

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


def is_oom_error(exception: BaseException) -> bool:
    """Return whether an exception says that memory ran out, on a device or on the host."""
    return is_cuda_out_of_memory(exception) or is_cudnn_snafu(exception) or is_out_of_cpu_memory(exception)


def is_cuda_out_of_memory(exception: BaseException) -> bool:
    """Return whether an exception says that the memory of a device ran out."""
    if isinstance(exception, torch.OutOfMemoryError):
        return True
    text = str(exception)
    return isinstance(exception, RuntimeError) and "out of memory" in text and ("CUDA" in text or "MPS" in text)


def is_cudnn_snafu(exception: BaseException) -> bool:
    """Return whether an exception is one that cuDNN and cuBLAS raise where memory ran out, though it says otherwise."""
    text = str(exception)
    return isinstance(exception, RuntimeError) and (
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED." in text or "CUBLAS_STATUS_ALLOC_FAILED" in text
    )


def is_out_of_cpu_memory(exception: BaseException) -> bool:
    """Return whether an exception says that the memory of the host ran out."""
    return isinstance(exception, MemoryError) or (
        isinstance(exception, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(exception)
    )


def garbage_collection_cuda() -> None:
    """Collect garbage, and give memory of CUDA devices that is not used back to the driver."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        try:
            torch.cuda.empty_cache()
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
