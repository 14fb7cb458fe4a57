"""Streams: iterables that make their batches in this process, while training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar, final

import torch
from torch.utils.data import DataLoader, IterableDataset

from treadle_fabric.data.combined import CombinedLoader
from treadle_fabric.data.samplers import sized_len
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.randomness import PrivateRandomness
from treadle_fabric.rank_zero import rank_zero_warn

__all__ = ["PrivateStream", "is_stream", "keeps_position", "warn_of_draws"]

Batch = TypeVar("Batch")

_DRAWS = (
    "The training loader ({kind}) draws from the global random generators of this process for each batch. A run that is"
    " resumed within an epoch goes on with the same random states, but the batches before are drawn again from other"
    " states. That is exact unless the loader keeps something of them, such as a buffer to shuffle in or the state of a"
    " simulation. It is exact in any case with workers (`DataLoader(..., num_workers=1)`), with generators of the"
    " loader's own that are seeded when an epoch begins, or with `treadle_fabric.PrivateStream(loader)`, which gives it"
    " private random states."
)


def is_stream(loader: Any) -> bool:
    """Whether a loader makes each batch in this process when it is asked for the batch.

    Such a loader may draw from the global generators and read the model's weights, between the steps of training. A
    list of batches, a ``DataLoader`` over indexed samples and a ``DataLoader`` with workers are no streams; a
    ``CombinedLoader`` is a stream where any of its loaders is.

    Args:
        loader: Any iterable of batches.
    """
    if isinstance(loader, CombinedLoader):
        return any(map(is_stream, loader.flattened))
    if isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__:
        return isinstance(loader.dataset, IterableDataset) and not loader.num_workers
    return not isinstance(loader, (list, tuple))


def keeps_position(loader: Any) -> bool:
    """Whether a loader saves and restores its position itself; what a ``CombinedLoader`` saves is that of its parts."""
    return (
        not isinstance(loader, CombinedLoader) and hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    )


def warn_of_draws(loader: Any) -> None:
    """Warn of a stream that draws for each batch: what a resumed run repeats of it, and what not."""
    rank_zero_warn(_DRAWS.format(kind=type(loader).__name__))


@final
class PrivateStream(Generic[Batch]):
    """Gives a stream random numbers of its own, so that a run resumed in mid-epoch draws the same batches again.

    What the stream draws from the global generators of torch, NumPy and Python, it draws from private states instead.
    Their seed is drawn from torch's global generator when an epoch begins, as a ``DataLoader`` does for its workers.
    The numbers then depend neither on what training draws in between nor on the batch at which a run was resumed, but
    they are not those of a loop without this class. Setting the states costs about 30 us a batch.

    Args:
        stream: An iterable of batches that draws in this process.

    Raises:
        MisconfigurationException: The loader is no stream, so that it needs no such states.

    Example:
        >>> stream = PrivateStream(torch.rand(8, 3) for _ in range(100))
    """

    def __init__(self, stream: Iterable[Batch]) -> None:
        if not is_stream(stream):
            raise MisconfigurationException(
                f"PrivateStream got a {type(stream).__name__} that does not draw its batches in this process (it has"
                " workers, indexed samples, or is a list): pass it as it is, it is resumed to the last bit."
            )
        self.stream = stream

    def __iter__(self) -> Iterator[Batch]:
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        return (batch for chunk in PrivateRandomness(seed).chunks(self.stream, 1) for batch in chunk)

    def __len__(self) -> int:
        if (length := sized_len(self.stream)) is None:
            raise TypeError(f"{type(self.stream).__name__} has no length.")
        return length
