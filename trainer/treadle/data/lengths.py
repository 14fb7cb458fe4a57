"""The length of a loader, and whether it is reliable."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from treadle_fabric import MisconfigurationException, infer_batch_size

__all__ = []


def unlimited(limit: float, length: int | None) -> bool:
    """Whether a limit lets all batches through; an int that equals the length that a stream says is a limit."""
    return limit == 1.0 if isinstance(limit, float) else length is not None and limit > length


def has_exact_length(loader: Any) -> bool:
    """Whether ``len`` is reliable; streams and iterables of the user's own may have other numbers of batches."""
    if isinstance(loader, DataLoader):
        return not isinstance(loader.dataset, IterableDataset)
    return isinstance(loader, (list, tuple))


def is_empty(loader: Any) -> str:
    """The beginning of a message about a loader that says that it has no batches."""
    return f"Total length of `{type(loader).__name__}` across ranks is zero ({describe(loader)})"


def describe(loader: Any) -> str:
    """The kind and size of a loader, for messages."""
    if isinstance(loader, DataLoader):
        try:
            size = str(len(loader.dataset))  # type: ignore[arg-type]
        except TypeError:
            size = "?"
        return f"a DataLoader of {size} samples, batch_size={loader.batch_size}, drop_last={loader.drop_last}"
    return f"a {type(loader).__name__}"


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
