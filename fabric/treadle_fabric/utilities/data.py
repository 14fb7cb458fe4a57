"""What is known of loaders, where users of Lightning Fabric look for it."""

from __future__ import annotations

import os

from torch.utils.data import IterableDataset

from treadle_fabric.attribute_dict import AttributeDict
from treadle_fabric.data.samplers import has_len, set_epoch, sized_len, suggested_max_num_workers

__all__ = [
    "AttributeDict",
    "_num_cpus_available",
    "_set_sampler_epoch",
    "has_iterable_dataset",
    "has_len",
    "sized_len",
    "suggested_max_num_workers",
]

_set_sampler_epoch = set_epoch


def has_iterable_dataset(dataloader: object) -> bool:
    """Whether the dataset of a loader is an ``IterableDataset``."""
    return isinstance(getattr(dataloader, "dataset", None), IterableDataset)


def _num_cpus_available() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS, Windows
