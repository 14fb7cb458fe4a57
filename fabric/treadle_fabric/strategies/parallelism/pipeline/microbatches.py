"""Cut a batch into micro-batches of the same size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treadle_fabric.batches import infer_batch_size
from treadle_fabric.containers import leaves_by_path, map_leaves
from treadle_fabric.errors import MisconfigurationException

__all__: list[str] = []


def size_of(batch: Any) -> int:
    """Return the number of samples.

    Raises:
        MisconfigurationException: There are none, or no tensor tells it.
    """
    size = infer_batch_size(batch)
    if not size:
        has = "no tensor that tells its size" if size is None else "0 samples"
        raise MisconfigurationException(
            f"A batch (a {type(batch).__name__}) has {has},"
            " and a pipeline cuts batches into micro-batches: give batches with samples, in tensors whose first"
            " dimension is the batch."
        )
    return size


def cut(batch: Any, count: int) -> list[Any]:
    """Cut a batch along the first dimension of its tensors.

    Lists without tensors, of one entry a sample, are cut too; all else is in each micro-batch as it is.

    Args:
        batch: Tensors, in containers of any kind.
        count: The number of micro-batches, which divides the number of samples.

    Returns:
        The micro-batches, in order.

    Raises:
        MisconfigurationException: A tensor has another first dimension than the batch has samples.
    """
    if count == 1:
        return [batch]
    size = size_of(batch)
    found = False
    for path, leaf in leaves_by_path(batch, lambda each: isinstance(each, Tensor)):
        if isinstance(leaf, Tensor) and leaf.dim():
            found = True
            if len(leaf) != size:
                raise MisconfigurationException(
                    f"batch{path} has {len(leaf)} rows, and the batch {size} samples: a pipeline cuts every tensor of a"
                    " batch along its first dimension. Keep what belongs to no sample in the module, as a buffer."
                )
    if not found:
        raise MisconfigurationException(
            f"A batch is a {type(batch).__name__} without tensors in containers, and a pipeline cannot cut it into"
            f" {count} micro-batches: give a dict, a tuple or a dataclass of tensors."
        )
    length = size // count

    def piece(index: int) -> Any:
        rows = slice(index * length, (index + 1) * length)
        return map_leaves(batch, lambda leaf: leaf[rows] if _is_cut(leaf, size) else leaf, _is_leaf)

    return [piece(index) for index in range(count)]


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Tensor) or _is_plain_list(value)


def _is_plain_list(value: Any) -> bool:
    return type(value) is list and all(isinstance(item, (str, bytes, int, float)) or item is None for item in value)


def _is_cut(leaf: Any, size: int) -> bool:
    return bool(leaf.dim()) if isinstance(leaf, Tensor) else len(leaf) == size


def form_of(batch: Any) -> tuple[Any, ...]:
    """Return what tells whether two micro-batches have the same structure, shapes and dtypes."""
    return tuple(
        (path, tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else (path, type(leaf))
        for path, leaf in leaves_by_path(batch, lambda each: isinstance(each, Tensor))
    )
