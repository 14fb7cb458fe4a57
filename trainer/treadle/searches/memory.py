"""Errors of full memory, and what frees memory after one."""

from __future__ import annotations

import gc
from typing import Final

import torch

__all__ = ["free_memory", "is_out_of_memory"]

_MESSAGES: Final = (
    "out of memory",  # CUDA, MPS, XLA
    "CUDNN_STATUS_NOT_SUPPORTED",  # of cuDNN and cuBLAS, which find no room for their workspace
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # of torch's allocator on the CPU: Linux, then Windows
    "not enough memory",
    "Cannot allocate memory",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what has caused it, says that the memory of a device or of the host is full."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES):
            return True
        error = error.__cause__
    return False


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
