"""BasePredictionWriter: what is written when, and of which samples it is.

Tests of ``treadle.callbacks.prediction_writer``, and of the order that ``treadle_fabric.data.samplers`` records.
"""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import Net, Samples, loader, trainer
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

import treadle as L
from treadle.callbacks import BasePredictionWriter
from treadle_fabric.data import CombinedLoader


class Firsts(Net):
    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch[..., 0]


class Writer(BasePredictionWriter):
    def __init__(self, write_interval: Any = "batch_and_epoch") -> None:
        super().__init__(write_interval)
        self.batches: list[Any] = []
        self.epochs: list[Any] = []

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, batch_idx: int, loader: int
    ) -> None:
        self.batches.append((loader, batch_idx, batch_indices, prediction.tolist(), batch[..., 0].tolist()))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epochs.append((predictions, batch_indices))


class Halves:
    """Batches of unequal sizes, in an order of the user's own, as tuples."""

    def __iter__(self) -> Any:
        yield from ((5, 1), (0, 3, 2), (4,))

    def __len__(self) -> int:
        return 3


class Collating(Samples):
    def __getitem__(self, index: Any) -> Tensor:
        return torch.tensor(index, dtype=torch.float32)[:, None] if isinstance(index, list) else super()[index]


LOADERS: dict[str, Any] = {
    "in order": lambda: loader(7),
    "shuffled": lambda: loader(7, shuffle=True),
    "loaded by workers, as they come": lambda: loader(7, shuffle=True, num_workers=2, in_order=False),
    "of batches of my own": lambda: DataLoader(Samples(6), batch_sampler=Halves()),
    "of tensors": lambda: DataLoader(Samples(6), sampler=torch.randperm(6), batch_size=2),
    "of batches made by the dataset": lambda: DataLoader(
        Collating(7), sampler=BatchSampler(RandomSampler(Samples(7)), 3, False), batch_size=None
    ),
    "not batched": lambda: DataLoader(Samples(3), sampler=[2, 0, 1], batch_size=None),
    "without the last": lambda: loader(7, drop_last=True, shuffle=True),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_indices_are_those_of_the_samples(tmp_path: Path, kind: str) -> None:
    writer, given = Writer(), LOADERS[kind]()
    run = trainer(tmp_path, callbacks=writer)
    kept = run.predict(Firsts(), given)
    assert run.predict_dataloaders is given or given.drop_last
    assert len(writer.batches) == len(given) + (kind == "without the last")  # which is predicted, too
    for _, _, indices, found, batch in writer.batches:
        assert indices == (found if isinstance(found, list) else [found])
        assert found == batch and all(type(index) is int for index in indices)
    (epoch,) = writer.epochs
    assert epoch[1] == [[indices for _, _, indices, _, _ in writer.batches]]
    assert all(map(torch.equal, epoch[0], kept))


def test_several_loaders_of_which_one_is_a_stream(tmp_path: Path) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter([torch.zeros(1), torch.ones(1)])

    writer = Writer()
    loaders = CombinedLoader([loader(3), DataLoader(Stream()), loader(2)], "sequential")
    trainer(tmp_path, callbacks=writer).predict(Firsts(), loaders, return_predictions=False)
    indices = [[[0, 1], [2]], [None, None], [[0, 1]]]
    assert [(i, b, at) for i, b, at, _, _ in writer.batches] == [
        (i, b, at) for i, part in enumerate(indices) for b, at in enumerate(part)
    ]
    ((predictions, found),) = writer.epochs
    assert found == indices and [len(part) for part in predictions] == [2, 2, 1]


def test_each_interval_writes_when_it_says(tmp_path: Path) -> None:
    for interval, counts in (("batch", (4, 0)), ("epoch", (0, 1)), ("batch_and_epoch", (4, 1))):
        writer = Writer(interval)
        assert trainer(tmp_path, callbacks=writer).predict(Firsts(), loader(8), return_predictions=False) is None
        assert (len(writer.batches), len(writer.epochs)) == counts
    writer = Writer()
    stream = trainer(tmp_path, callbacks=writer, limit_predict_batches=3).predict(
        Firsts(), loader(8, shuffle=True), return_predictions="stream"
    )
    streamed = [batch.tolist() for batch in stream]
    assert [found for _, _, _, found, _ in writer.batches] == streamed
    assert writer.epochs[0][1] == [streamed]


def test_nothing_is_kept_that_is_not_needed(tmp_path: Path) -> None:
    alive: list[int] = []

    class Made:
        made: list[weakref.ref[Any]] = []

    class Making(Net):
        def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
            found = Made()
            Made.made.append(weakref.ref(found))
            gc.collect(0)
            alive.append(sum(each() is not None for each in Made.made))
            return found

    class Quiet(Writer):
        def write_on_batch_end(self, *args: Any) -> None: ...

        def write_on_epoch_end(self, *args: Any) -> None: ...

    for interval, most in (("batch", 2), ("epoch", 6)):
        alive.clear()
        writer = Quiet(interval)
        run = trainer(tmp_path, callbacks=writer)
        run.predict(Making(), loader(12), return_predictions=False)
        assert max(alive) == most
        gc.collect()
        assert not any(each() is not None for each in Made.made), "the epoch was written"


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(L.MisconfigurationException, match="write_interval='step'.* 'batch', 'epoch', 'batch_and_epoch"):
        Writer("step")

    class Half(BasePredictionWriter):
        def write_on_batch_end(self, *args: Any) -> None: ...

    with pytest.raises(L.MisconfigurationException, match="Half has write_interval='epoch' and no `write_on_epoch_end"):
        trainer(tmp_path, callbacks=Half("epoch")).predict(Firsts(), loader(2))
    trainer(tmp_path, callbacks=Half("epoch")).fit(Firsts(), loader(2))  # where it does not write


def in_ranks(path: Path) -> None:
    writer = Writer()
    run = trainer(path, devices=2, strategy="ddp", callbacks=writer)
    run.predict(Firsts(), [loader(7, shuffle=True), DataLoader(Samples(6), batch_sampler=Halves())])
    (path / f"{run.global_rank}.json").write_text(json.dumps([writer.batches, writer.epochs[0][1]]))


@pytest.mark.timeout(110)
def test_each_rank_writes_its_own_batches(tmp_path: Path) -> None:
    run_in_ranks(in_ranks, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for batches, epoch in ranks:
        assert all(indices == found for _, _, indices, found, _ in batches)
        assert epoch == [[at for i, _, at, _, _ in batches if i == part] for part in (0, 1)]
    shuffled = [index for batches, _ in ranks for i, _, at, _, _ in batches if i == 0 for index in at]
    assert sorted(shuffled) == [*range(7)] and shuffled != [*range(7)]
    assert [epoch[1] for _, epoch in ranks] == [[[5, 1], [4]], [[0, 3, 2]]]
