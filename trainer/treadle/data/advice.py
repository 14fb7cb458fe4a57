"""Tell, when the loaders of a stage are known, what slows them down or may not be meant."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from treadle_fabric import PossibleUserWarning, rank_zero_warn
from treadle_fabric.data import CombinedLoader, several_loaders, sized_len, suggested_max_num_workers

__all__ = ["advise"]

_IN_MEMORY = (TensorDataset, list, tuple, Tensor)
"""Datasets whose samples are there already, so that a worker only adds the way between two processes."""


def advise(loaders: Any, stage: str, *, processes: int, overfit: bool) -> None:
    """Warn of loaders of a stage that are slow without need, or give other samples than is likely meant.

    Args:
        loaders: The user's loader or loaders.
        stage: "train", "val", "test" or "predict".
        processes: The number of processes on this machine, which share its cores.
        overfit: Whether every epoch is to have the same batches, for which shuffling is turned off.
    """
    name = f"{stage}_dataloader"
    told: set[tuple[str, type[Warning]]] = set()
    for loader in _each(loaders):
        if isinstance(loader, DataLoader):
            told.update(_advice(loader, name, processes))
            if isinstance(loader.sampler, RandomSampler):
                told.update(_of_shuffling(stage, name, overfit=overfit))
    for message, category in sorted(told, key=lambda each: each[0]):
        rank_zero_warn(message, category=category)


def _each(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, CombinedLoader):
        yield from loaders.flattened
    elif isinstance(loaders, Mapping):
        for each in loaders.values():
            yield from _each(each)
    elif (several := several_loaders(loaders)) is not None:
        for each in several:
            yield from _each(each)
    else:
        yield loaders


def _advice(loader: DataLoader[Any], name: str, processes: int) -> Iterator[tuple[str, type[Warning]]]:
    workers, most = loader.num_workers, suggested_max_num_workers(processes)
    if workers and _start_method(loader) != "fork" and not loader.persistent_workers:
        yield (
            f"The '{name}' starts its {workers} workers anew for every epoch. Consider setting"
            " `persistent_workers=True` in the DataLoader, which keeps them.",
            UserWarning,
        )
    elif workers < 2 <= most and not isinstance(loader.dataset, _IN_MEMORY):
        yield (
            f"The '{name}' does not have many workers ({workers}), so that training may wait for batches."
            f" Consider increasing the value of the `num_workers` argument of the DataLoader, to {most} at most"
            " on this machine.",
            PossibleUserWarning,
        )
    if workers > 1 and isinstance(loader.dataset, IterableDataset) and sized_len(loader) is not None:
        yield (
            f"Your `IterableDataset` has `__len__` defined, and the '{name}' has {workers} workers, each of which"
            " iterates a copy of it: unless each gives a part of the samples (`torch.utils.data.get_worker_info()`),"
            " samples come several times, and the length is wrong.",
            UserWarning,
        )


def _of_shuffling(stage: str, name: str, *, overfit: bool) -> Iterator[tuple[str, type[Warning]]]:
    if overfit:
        yield (
            f"You requested to overfit but enabled {stage} dataloader shuffling: it is turned off, so that every epoch"
            f" has the same batches. Leave out `shuffle=True` in the '{name}'.",
            UserWarning,
        )
    elif stage != "train":
        yield (
            f"Your `{name}`'s sampler has shuffling enabled, so that batches differ from one evaluation to the next."
            " Leave out `shuffle=True` there.",
            PossibleUserWarning,
        )


def _start_method(loader: DataLoader[Any]) -> str:
    """How the loader's workers are started; asking for it must not settle it for the program."""
    context = loader.multiprocessing_context
    if context is not None and not isinstance(context, str):
        return str(context.get_start_method())
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
