"""The search for a batch size as an algorithm, and what counts as full memory.

Tests of ``treadle.searches.batch_size``, ``treadle_fabric.accelerators.memory``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from treadle.searches.batch_size import BatchSizeSearch, largest_that_fits
from treadle_fabric import MisconfigurationException
from treadle_fabric.accelerators import is_oom_error


def search(room: int, samples: int | None = None, **options: Any) -> tuple[int, list[int]]:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= room

    return largest_that_fits(BatchSizeSearch(**options), fits, lambda: samples), tried


@pytest.mark.parametrize(
    ("room", "samples", "options", "found", "tried"),
    [
        (20, None, {}, 16, [2, 4, 8, 16, 32]),
        (20, None, {"max_trials": 3}, 8, [2, 4, 8]),
        (20, None, {"init_val": 5}, 20, [5, 10, 20, 40]),
        (20, None, {"init_val": 100}, 12, [100, 50, 25, 12]),
        (1, None, {}, 1, [2, 1]),
        (99, 5, {}, 5, [2, 4, 5]),  # never more than there are samples
        (99, 5, {"init_val": 64}, 5, [64]),
        (99, None, {"max_val": 50}, 50, [2, 4, 8, 16, 32, 50]),
        (20, None, {"mode": "binsearch", "margin": 0}, 20, [2, 4, 8, 16, 32, 24, 20, 22, 21]),
        (20, None, {"mode": "binsearch"}, 19, [2, 4, 8, 16, 32, 24, 20, 22, 21]),
        (13, None, {"mode": "binsearch", "margin": 0.5}, 6, [2, 4, 8, 16, 12, 14, 13]),
        (1, None, {"mode": "binsearch"}, 1, [2, 1]),
        (99, None, {"mode": "binsearch", "margin": 0, "max_trials": 2}, 4, [2, 4]),
    ],
)
def test_sizes_that_are_tried(
    room: int, samples: int | None, options: dict[str, Any], found: int, tried: list[int]
) -> None:
    assert search(room, samples, **options) == (found, tried)


def test_where_nothing_fits_the_smallest_size_is_named() -> None:
    with pytest.raises(MisconfigurationException, match="the smallest that was tried is 1"):
        search(0)
    with pytest.raises(MisconfigurationException, match="is 25.* raise max_trials"):
        search(0, init_val=100, max_trials=3)


def caused_by_full_memory() -> Exception:
    try:
        raise ValueError("in a hook") from torch.OutOfMemoryError("CUDA out of memory")
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("Tried to allocate"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (MemoryError("Unable to allocate 8.00 TiB"), True),
        (caused_by_full_memory(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_of_full_memory(error: BaseException, expected: bool) -> None:
    assert is_oom_error(error) is expected


def test_the_allocator_of_the_cpu_says_that_memory_is_full() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_oom_error(raised.value)
