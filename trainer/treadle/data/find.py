"""Find the loaders of a run: the method's argument, or what the data module or the module gives."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from treadle.module import LightningDataModule, LightningModule
from treadle.module.overriding import overrides
from treadle_fabric import WrongTypeError
from treadle_fabric.data import copy_loader, has_iterable_dataset

__all__ = ["check_loader", "find_loaders", "gives_loaders"]


def find_loaders(given: Any, name: str, module: LightningModule, datamodule: LightningDataModule | None) -> Any:
    """The loaders of a stage: the argument, else those of :func:`gives_loaders`; None where there are none."""
    if given is not None:
        return given
    owner = gives_loaders(module, datamodule)
    if not defines_loader(owner, name):
        return None
    found = getattr(owner, name)()
    if found is None and name == "train_dataloader":
        raise WrongTypeError(f"`{type(owner).__qualname__}.{name}` returned None: return an iterable of batches.")
    return found


def gives_loaders(module: LightningModule, datamodule: LightningDataModule | None) -> Any:
    """The object whose dataloader methods a run asks: the data module where there is one, and else the module."""
    return module if datamodule is None else datamodule


def defines_loader(owner: Any, name: str) -> bool:
    """Whether a module or data module has its own dataloader method."""
    return overrides(owner, name, LightningModule if isinstance(owner, LightningModule) else LightningDataModule)


def check_loader(loader: Any, name: str) -> None:
    """Refuse a dataset without a loader, and anything that cannot be iterated."""
    if isinstance(loader, Dataset) and not isinstance(loader, (Iterator, IterableDataset)):
        raise WrongTypeError(f"{name} got a Dataset ({type(loader).__name__}): wrap it in a DataLoader.")
    if isinstance(loader, (str, bytes)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise WrongTypeError(
            f"{name} got {type(loader).__name__}, which cannot be iterated: pass a DataLoader or any iterable of"
            " batches."
        )


def sequential(loader: Any) -> Any:
    """The loader without shuffling, for overfitting on the same batches."""
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, RandomSampler):
        return loader
    other = copy.copy(loader)
    fields = other.__dict__
    fields["sampler"] = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    if loader.batch_sampler is not None:
        fields["batch_sampler"] = BatchSampler(fields["sampler"], loader.batch_size or 1, loader.drop_last)
    return other


def with_last_batch(loader: Any) -> Any:
    """The loader with the shorter last batch that ``drop_last=True`` leaves out: each sample has a prediction."""
    batches = loader.batch_sampler if isinstance(loader, DataLoader) and not has_iterable_dataset(loader) else None
    if not isinstance(batches, BatchSampler) or not batches.drop_last:
        return loader
    whole = copy.copy(batches)  # which may be of a class of the user's
    whole.drop_last = False
    return copy_loader(loader, batch_sampler=whole, drop_last=False)


def first_loader(triples: Iterable[tuple[Any, int, int]]) -> Iterator[Any]:
    """The batches of a CombinedLoader, without their numbers."""
    for batch, _, _ in triples:
        yield batch
