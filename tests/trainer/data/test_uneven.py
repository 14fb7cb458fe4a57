"""Uneven and odd data: ranks that run out at different times, lengths that are wrong, a loader that raises.

As a program, this file is what two ranks run.

Tests of ``treadle.data.training``, ``treadle.data.lengths``, ``treadle.data.limits``, ``treadle.data.lookahead``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import Net, Samples, loader, trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import treadle as L
from treadle.callbacks import ModelCheckpoint

pytestmark = pytest.mark.timeout(100)


class Stream(IterableDataset[Tensor]):
    """``n`` samples of unknown length, or with a length that need not be true."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(self.n):
            yield torch.full((4,), float(i))


class Promising(Stream):
    def __init__(self, n: int, promised: int) -> None:
        super().__init__(n)
        self.promised = promised

    def __len__(self) -> int:
        return self.promised


class Counting(Net):
    """Counts its batches, and logs something of each."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[int] = [0]
        self.validated = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.trained[-1] += 1
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.trained.append(0)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.validated += 1
        self.log("mean", batch.mean())


def ranks(folder: Path) -> None:
    """What both ranks do; rank 1 has less than rank 0."""
    out: dict[str, Any] = {}
    rank = int(os.environ.get("LOCAL_RANK", 0))
    cases: dict[str, Any] = {
        "stream": DataLoader(Stream((20, 14)[rank]), 2),
        "one is empty": DataLoader(Stream((6, 0)[rank]), 2),
        "list": [torch.ones(2, 4)] * (6, 4)[rank],
        "wrong length": DataLoader(Promising((10, 12)[rank], 6), 2),
        "of two kinds": [torch.ones(2, 4)] * 5 if rank else DataLoader(Stream(6), 2),
    }
    for name, batches in cases.items():
        model = Counting()
        run = trainer(folder, devices=2, strategy="ddp", max_epochs=2, accumulate_grad_batches=3)
        run.fit(model, batches, DataLoader(Stream((10, 3)[rank]), 2))
        out[name] = [model.trained[:-1], run.global_step, float(run.callback_metrics.get("mean", -1))]
        out[name] += [model.layer.weight.flatten().tolist()]
    (folder / f"rank{rank}.json").write_text(json.dumps(out))


def test_ranks_that_run_out_at_different_times_end_together(tmp_path: Path) -> None:
    said = run_in_ranks(ranks, tmp_path)
    zero, one = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    mean = (sum(range(10)) + sum(range(3))) / 13  # evaluation counts each sample once
    for name, batches in {"stream": 7, "one is empty": 0, "list": 4, "wrong length": 5, "of two kinds": 3}.items():
        assert zero[name][0] == one[name][0] == [batches] * 2
        assert zero[name][1] == one[name][1] == 2 * -(-batches // 3)
        assert zero[name][3] == one[name][3], "the same weights on both"
        if batches:
            assert zero[name][2] == one[name][2] == pytest.approx(mean)
    assert said.count("1 of 2 ranks had no more than 7 training batches in epoch") == 1
    assert "The ranks have 6, 4 training batches: an epoch ends after 4, for all" in said


@pytest.mark.parametrize(("promised", "n"), [(6, 10), (10, 6)])
@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_a_stream_is_trained_on_whole_whatever_its_length_says(tmp_path: Path, promised: int, n: int) -> None:
    model = Counting()
    run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2)
    run.fit(model, DataLoader(Promising(n, promised), 2), DataLoader(Promising(n, promised), 2))
    assert model.trained == [n // 2, n // 2, 0]
    assert run.global_step == 2 * -(-n // 4)
    assert run.num_training_batches == promised // 2
    assert model.validated == min(2, n // 2) + 2 * (n // 2)  # the sanity check, then each epoch
    assert trainer(tmp_path, limit_train_batches=2).fit(model, DataLoader(Promising(n, promised), 2)) is None
    assert model.trained[-2] == 2


class Failing(Samples):
    """Cannot read one of its samples the first time."""

    def __init__(self, n: int, bad: int) -> None:
        super().__init__(n)
        self.bad = bad

    def __getitem__(self, index: int) -> Tensor:
        if index == self.bad:
            self.bad = -1
            raise OSError("the disk is away")
        return super().__getitem__(index)


def test_a_loader_that_raises_once_loses_nothing(tmp_path: Path) -> None:
    def fit(dataset: Samples, folder: str, **kwargs: Any) -> tuple[L.Trainer, Net]:
        L.seed_everything(2, verbose=False)
        saving = ModelCheckpoint(tmp_path / folder, save_last=True, every_n_train_steps=1)
        model, batches = Net(), DataLoader(dataset, 2, shuffle=True)
        run = trainer(tmp_path, callbacks=saving, enable_checkpointing=True, max_epochs=2)
        run.fit(model, batches, **kwargs)
        return run, model

    _, expected = fit(Samples(12), "whole")
    dataset = Failing(12, bad=7)
    with pytest.raises(OSError, match="the disk is away") as caught:
        fit(dataset, "failing")
    assert "of epoch 0 from the training loader was loaded" in "".join(caught.value.__notes__)
    run, model = fit(dataset, "failing", ckpt_path="last")
    assert run.global_step == 12
    assert torch.equal(model.layer.weight, expected.layer.weight)
    with pytest.raises(OSError, match="disk is away") as caught:
        trainer(tmp_path).validate(model, DataLoader(Failing(4, bad=2), 2), verbose=False)
    assert "batch 1 of val_dataloaders (0) was loaded" in "".join(caught.value.__notes__)


class Uneven(DataLoader):
    """Draws from two loaders at a time, and fails beyond its length, to which both are iterated."""

    def __init__(self) -> None:
        super().__init__(Samples(8), 4)
        self.other = DataLoader(Samples(12), 4, shuffle=True)

    def __iter__(self) -> Iterator[Any]:
        return (first for first, _ in zip(super().__iter__(), self.other, strict=True))


def test_a_loader_that_fails_beyond_its_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer"):
        list(Uneven())
    model = Counting()
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, Uneven(), loader(4))
    assert model.trained[:2] == [2, 2] and run.global_step == 4
    path = tmp_path / "end.ckpt"
    run.save_checkpoint(path)
    trainer(tmp_path, max_epochs=3).fit(model, Uneven(), ckpt_path=path)
    assert model.trained[2] == 2


def test_samplers_of_validation_hear_of_every_epoch(tmp_path: Path) -> None:
    class Telling(torch.utils.data.Sampler[int]):
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

        def __len__(self) -> int:
            return 4

    sampler = Telling()
    val = DataLoader(Samples(4), 2, sampler=sampler)
    trainer(tmp_path, max_epochs=3, num_sanity_val_steps=0).fit(Net(), loader(4), val)
    assert sampler.epochs == [0, 1, 2]
