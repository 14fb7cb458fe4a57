"""Where the batches of a run come from, how many there are, and how they reach the device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from treadle.combined_cursor import make_cursor
from treadle.combined_loader import CombinedLoader
from treadle.dispatch import check_signature, overrides
from treadle.hooks import DataHooks
from treadle.schedule import limit_batches
from treadle_fabric import MisconfigurationException, rank_zero_warn
from treadle_fabric.data import (
    ShardedSampler,
    move_data_to_device,
    samplers,
    set_epoch,
    sized_len,
)
from treadle_fabric.epochs import Epochs
from treadle_fabric.loaders import share_loader

if TYPE_CHECKING:
    from treadle.datamodule import LightningDataModule
    from treadle.module import LightningModule
    from treadle_fabric import Fabric

__all__ = ["BatchIterator", "EvaluationData", "Lookahead", "TrainingData", "find_loaders", "make_transfer"]

Transfer = Callable[[Any, int], Any]


def find_loaders(given: Any, name: str, module: LightningModule, datamodule: LightningDataModule | None) -> Any:
    """The loaders of a stage: what the user passed, else the data module's, else the module's; None without any."""
    if given is not None:
        return given
    for owner in (datamodule, module):
        if owner is not None and defines_loader(owner, name):
            found = getattr(owner, name)()
            if found is None and name == "train_dataloader":
                raise MisconfigurationException(
                    f"`{type(owner).__qualname__}.{name}` returned None: return an iterable of batches."
                )
            return found
    return None


def defines_loader(owner: Any, name: str) -> bool:
    """Whether a module or data module has its own dataloader method."""
    from treadle.datamodule import LightningDataModule
    from treadle.module import LightningModule

    return overrides(owner, name, LightningModule if isinstance(owner, LightningModule) else LightningDataModule)


def check_loader(loader: Any, name: str) -> None:
    """Refuse what cannot be iterated, and a dataset that was given without a loader."""
    from torch.utils.data import Dataset

    if isinstance(loader, Dataset) and not isinstance(loader, (Iterator, IterableDataset)):
        raise MisconfigurationException(f"{name} got a Dataset ({type(loader).__name__}): wrap it in a DataLoader.")
    if isinstance(loader, (str, bytes)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise MisconfigurationException(
            f"{name} got {type(loader).__name__}, which cannot be iterated: pass a DataLoader or any iterable of"
            " batches."
        )


def make_transfer(
    module: LightningModule, datamodule: LightningDataModule | None, device: torch.device, run: Callable[..., Any]
) -> Transfer:
    """How a batch reaches the device: directly, or through the transfer hooks that somebody overrode.

    Args:
        module: may override the hooks.
        datamodule: may override them too, and comes first.
        device: where to.
        run: calls a function under the name of its hook.
    """
    chosen: dict[str, Callable[..., Any]] = {}
    for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        for owner in (datamodule, module):
            if owner is not None and overrides(owner, name, DataHooks):
                chosen[name] = getattr(owner, name)
                arguments = (
                    ("batch", "device", "dataloader_idx")
                    if name.startswith("transfer")
                    else ("batch", "dataloader_idx")
                )
                check_signature(chosen[name], name, arguments, type(owner).__qualname__)
                break
    if not chosen:
        return lambda batch, dataloader_idx: move_data_to_device(batch, device)
    before, move, after = (
        chosen.get(n) for n in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    )

    def transfer(batch: Any, dataloader_idx: int) -> Any:
        if before is not None:
            batch = run("on_before_batch_transfer", before, batch, dataloader_idx)
        if move is not None:
            batch = run("transfer_batch_to_device", move, batch, device, dataloader_idx)
        else:
            batch = move_data_to_device(batch, device)
        if after is not None:
            batch = run("on_after_batch_transfer", after, batch, dataloader_idx)
        return batch

    return transfer


def _sequential(loader: Any, name: str) -> Any:
    """A loader whose shuffling is off, for overfitting on the same batches."""
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, RandomSampler):
        return loader
    rank_zero_warn(f"`overfit_batches` turns off the shuffling of {name}, so that every epoch has the same batches.")
    other = copy.copy(loader)
    fields = other.__dict__
    fields["sampler"] = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    if loader.batch_sampler is not None:
        fields["batch_sampler"] = BatchSampler(fields["sampler"], loader.batch_size or 1, loader.drop_last)
    return other


class TrainingData:
    """The training batches: a loader, or several combined."""

    def __init__(self, loader: Any, fabric: Fabric, *, limit: float, overfit: bool, inject: bool) -> None:
        several = isinstance(loader, (list, tuple, Mapping)) and not _is_batch_list(loader)
        combined = copy.copy(loader) if isinstance(loader, CombinedLoader) else None  # the user's stays as it is
        combined = CombinedLoader(loader, "max_size_cycle") if several else combined
        parts = list(combined.flattened) if combined is not None else [loader]
        for part in parts:
            check_loader(part, "train_dataloaders")
        if overfit:
            parts = [_sequential(part, "the training loader") for part in parts]
        self._fabric, self._inject = fabric, inject
        self.combined = combined
        loader, parts = self._share_out(parts)
        length = sized_len(loader)
        if length == 0:
            raise MisconfigurationException(
                f"train_dataloaders is empty: {_describe(parts[0])} gives no batch on rank {fabric.global_rank}."
                " Give it more samples, a smaller batch_size, or drop_last=False."
            )
        name = "overfit_batches" if overfit else "limit_train_batches"
        self.num_batches = limit_batches(length, limit, name)
        self.exact = length is not None and all(_has_exact_length(p) for p in parts)
        """Whether the length can be relied on; a stream's is only a promise."""

        self.whole = self.num_batches in (length, math.inf)
        """Whether an epoch is all of it: then it is iterated to its end, where samplers may draw once more."""
        self._agrees = self._told = False
        if fabric.world_size > 1:
            self._agree_on_length()
        self._stop = math.inf if not self.exact and _unlimited(limit, length) else self.num_batches
        self.epochs = Epochs(
            loader,
            parts,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            num_batches=self.num_batches,
            exact=self.exact,
            whole=self.whole,
            share_alone=self._share_alone,
            make_cursor=make_cursor,
        )
        """Where an epoch is drawn from, and from which position on."""

    @property
    def loader(self) -> Any:
        """This rank's share."""
        return self.epochs.loader

    @property
    def stop(self) -> float:
        """No epoch, and not the one that is iterated, has more batches than this."""
        return self._stop if self.epochs.end is None else self.epochs.end

    def has_ended(self, position: int) -> bool:
        """Whether nothing is left of an epoch that was resumed with another number of processes."""
        return self.epochs.end is not None and 0 < self.epochs.end <= position

    def _share_out(self, parts: Sequence[Any], *, alone: bool = False) -> tuple[Any, list[Any]]:
        """Take each part's share of this rank."""
        shares = [share_loader(p, self._fabric.strategy, share=self._inject, alone=alone) for p in parts]
        if self.combined is None:
            return shares[0], shares
        self.combined.flattened = shares
        return self.combined, shares

    def _share_alone(self) -> tuple[Any, list[Any]]:
        return self._share_out(self.epochs.parts, alone=True)

    def _agree_on_length(self) -> None:
        """All ranks train on as many batches: as those that have least, found out batch by batch for streams."""
        known = -1 if self.num_batches == math.inf else int(self.num_batches)
        mine = torch.tensor([known, self.exact], device=self._fabric.device)
        lengths, exact = self._fabric.all_gather(mine).T.tolist()
        if not all(exact):
            self._agrees, self.exact = True, False
            self.num_batches = math.inf if min(lengths) < 0 else min(lengths)
        elif min(lengths) != max(lengths):
            rank_zero_warn(
                f"The ranks have {', '.join(map(str, lengths))} training batches: an epoch ends after"
                f" {min(lengths)}, for all. Give each rank as many samples, or leave sharing them out to the"
                " Trainer (use_distributed_sampler=True)."
            )
            self.num_batches, self.whole = min(lengths), False

    def iterate(self, epoch: int, skip: int = 0) -> Iterator[tuple[int, Any, bool]]:
        """The batches of an epoch, shuffled for it, from the one after the first ``skip`` on.

        Each comes with its number and whether it is the epoch's last, on all ranks.
        """
        batches = self.epochs.iterate(epoch, skip)
        if self.combined is not None:
            batches = _first(batches)
        agree = partial(self._all_have_more, epoch) if self._agrees else None
        what, drain = f"of epoch {epoch} from the training loader", self.whole and not self.epochs.ends_without_drawing
        return iter(Lookahead(batches, skip, self.stop, what, exact=self.exact, drain=drain, agree=agree))

    def _all_have_more(self, epoch: int, index: int, more: bool) -> bool:
        """Whether every rank has a batch number ``index``; every rank asks."""
        world_size = self._fabric.world_size
        having = int(self._fabric.all_reduce(torch.tensor(int(more)), reduce_op="sum"))
        if 0 < having < world_size and not self._told:
            self._told = True
            rank_zero_warn(
                f"{world_size - having} of {world_size} ranks had no more than {index} training batches in epoch"
                f" {epoch}: it ends there for all, and what the others have left is not used. The same goes for later"
                " epochs."
            )
        return having == world_size


def _first(triples: Iterable[tuple[Any, int, int]]) -> Iterator[Any]:
    for batch, _, _ in triples:
        yield batch


def _is_batch_list(loader: Any) -> bool:
    """A plain list of batches (tensors, or tuples of them) is one loader, not several."""
    items = loader.values() if isinstance(loader, Mapping) else loader
    first = next(iter(items), None)
    if isinstance(loader, Mapping):
        return False
    if isinstance(first, torch.Tensor) or first is None:
        return True
    return isinstance(first, (list, tuple)) and bool(first) and isinstance(first[0], torch.Tensor)


def _unlimited(limit: float, length: int | None) -> bool:
    """Whether a limit lets all batches through; an int that is as large as the length promised is meant as a limit."""
    return limit == 1.0 if isinstance(limit, float) else length is not None and limit > length


def _has_exact_length(loader: Any) -> bool:
    """Whether ``len`` can be relied on: what a stream or an object of somebody's own says is only a promise."""
    if isinstance(loader, DataLoader):
        return not isinstance(loader.dataset, IterableDataset)
    return isinstance(loader, (list, tuple))


def _describe(loader: Any) -> str:
    if isinstance(loader, DataLoader):
        try:
            size = str(len(loader.dataset))  # type: ignore[arg-type]
        except TypeError:
            size = "?"
        return f"a DataLoader of {size} samples, batch_size={loader.batch_size}, drop_last={loader.drop_last}"
    return f"a {type(loader).__name__}"


class EvaluationData:
    """The loaders of a validation, a test or a prediction, one after the other."""

    def __init__(
        self, loaders: Any, fabric: Fabric, *, limit: float, name: str, inject: bool, overfit: bool = False
    ) -> None:
        share = partial(share_loader, strategy=fabric.strategy, share=inject, pad=False)
        self.combined: CombinedLoader | None = None
        if isinstance(loaders, CombinedLoader) and loaders.mode != "sequential":
            self.combined = loaders = copy.copy(loaders)  # the user's stays as it is
            self.loaders = [loaders]
            for part in loaders.flattened:
                check_loader(part, name)
            loaders.flattened = [share(p) for p in loaders.flattened]
        else:
            if isinstance(loaders, CombinedLoader):
                found = list(loaders.flattened)
            elif isinstance(loaders, Mapping):
                found = list(loaders.values())
            elif isinstance(loaders, (list, tuple)) and not _is_batch_list(loaders):
                found = list(loaders)
            else:
                found = [loaders]
            for loader in found:
                check_loader(loader, name)
            if overfit:
                found = [_sequential(loader, "the validation loader") for loader in found]
            turns = name.startswith("predict")  # the outputs of whole batches are put in order again
            self.loaders = [share(p, whole_batches=turns) for p in found]
        self.num_batches: list[float] = []
        self._name, self._limit = name, limit
        for i, loader in enumerate(self.loaders):
            length = sized_len(loader)
            if length == 0 and fabric.world_size == 1:
                rank_zero_warn(f"{name}: loader {i} is empty ({_describe(loader)}); nothing is evaluated on it.")
            self.num_batches.append(limit_batches(length, limit, f"limit_{name.split('_')[0]}_batches"))

    def is_shared(self, loader_idx: int) -> bool:
        """Whether each rank has other batches of it."""
        return any(isinstance(s, ShardedSampler) for s in samplers(self.loaders[loader_idx]))

    def iterate(self, loader_idx: int, epoch: int, limit: float) -> Iterator[tuple[int, Any, bool]]:
        """The first ``limit`` batches of one loader, with their numbers and whether each is the last."""
        loader = self.loaders[loader_idx]
        for part in self.combined.flattened if self.combined is not None else [loader]:
            set_epoch(part, epoch)
        batches = _first(iter(loader)) if self.combined is not None else iter(loader)
        length = sized_len(loader)
        if limit == length and not _has_exact_length(loader) and _unlimited(self._limit, length):
            limit = math.inf  # what a stream says of its length is only a promise
        return iter(Lookahead(batches, 0, limit, f"of {self._name} ({loader_idx})", exact=True))


class Lookahead:
    """Batches together with whether each is the last one.

    Where the length is known that costs a comparison; where it is not, one batch is fetched ahead.

    Args:
        batches: what to iterate.
        start: the number of the first.
        stop: the number to end before; infinity for none.
        what: names the batches in errors.
        exact: whether there are batches up to ``stop``.
        drain: ask for one more in the end.
        agree: with several ranks and no exact length: whether all have a batch of this number.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        start: int,
        stop: float,
        what: str,
        *,
        exact: bool,
        drain: bool = False,
        agree: Callable[[int, bool], bool] | None = None,
    ) -> None:
        self._batches, self._next, self._stop, self._exact, self._drain = batches, start, stop, exact, drain
        self._what, self._agree = what, agree

    def __iter__(self) -> Iterator[tuple[int, Any, bool]]:
        index, stop, batches = self._next, self._stop, self._batches
        if not self._exact:
            yield from self._one_ahead()
            return
        last = stop - 1
        while index < stop:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                self._locate(error, index)
                raise
            yield index, batch, index == last
            index += 1
        if self._drain:
            next(batches, None)

    def _one_ahead(self) -> Iterator[tuple[int, Any, bool]]:
        index, agree = self._next, self._agree
        more, batch = self._fetch(index)
        if agree is not None:
            more = agree(index, more)
        while more:
            more, following = self._fetch(index + 1)
            if agree is not None:
                more = agree(index + 1, more)
            yield index, batch, not more
            batch, index = following, index + 1

    def _fetch(self, index: int) -> tuple[bool, Any]:
        if index >= self._stop:
            return False, None
        try:
            return True, next(self._batches)
        except StopIteration:
            return False, None
        except Exception as error:
            self._locate(error, index)
            raise

    def _locate(self, error: Exception, index: int) -> None:
        error.add_note(f"This came while batch {index} {self._what} was loaded.")


def stay(batch: Any, dataloader_idx: int) -> Any:
    """The transfer of a batch that stays where it is."""
    return batch


class BatchIterator:
    """What a step that asks for ``dataloader_iter`` gets: (batch, batch_idx, dataloader_idx), batches on the device."""

    def __init__(self, batches: Iterable[tuple[int, Any, bool]], transfer: Transfer, dataloader_idx: int = 0) -> None:
        self._batches = iter(batches)
        self._transfer = transfer
        self._dataloader_idx = dataloader_idx
        self.batch: Any = None
        self._ahead: tuple[int, Any, bool] | None = next(self._batches, None)

    @property
    def done(self) -> bool:
        """Whether nothing is left."""
        return self._ahead is None

    def steps(self) -> Iterator[tuple[int, BatchIterator, bool]]:
        """One item a step, as :class:`Lookahead` gives them; the step itself draws the batches."""
        while self._ahead is not None:
            index, _, is_last = self._ahead  # a step draws one batch: the one ahead tells whether it is the last
            yield index, self, is_last

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> tuple[Any, int, int]:
        if self._ahead is None:
            raise StopIteration
        index, batch, _ = self._ahead
        self._ahead = next(self._batches, None)
        self.batch = self._transfer(batch, self._dataloader_idx)
        return self.batch, index, self._dataloader_idx
