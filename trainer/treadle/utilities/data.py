"""What is known of loaders, where users of a trainer look for it."""

from __future__ import annotations

from typing import Any

from treadle_fabric import MisconfigurationException, has_len, infer_batch_size, sized_len
from treadle_fabric.data import suggested_max_num_workers
from treadle_fabric.utilities.data import has_iterable_dataset

__all__ = ["extract_batch_size", "has_iterable_dataset", "has_len", "sized_len", "suggested_max_num_workers"]


def extract_batch_size(batch: Any) -> int:
    """Return the number of samples of a batch.

    Raises:
        MisconfigurationException: Nothing in the batch tells the number.
    """
    size = infer_batch_size(batch)
    if size is None:
        raise MisconfigurationException(
            f"A batch of type {type(batch).__name__} has no tensor that tells its size: pass `batch_size=` to self.log."
        )
    return size
