"""A run that goes on with another number of processes: the same samples in the same global batches, once an epoch.

Tests of ``treadle.checkpoint.elastic``, ``treadle.checkpoint.exact``, ``treadle_fabric.data.order``.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import Samples, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import treadle as L

pytestmark = pytest.mark.timeout(100)

GLOBAL_BATCH = 12
SAMPLES = 72  # 6 global batches an epoch
EPOCHS = 3


class Seeing(L.LightningModule):
    """Writes down the samples of each of its batches; saves and stops where it is told to."""

    def __init__(self, folder: Path, life: str, stop: int) -> None:
        super().__init__()
        self.folder, self.life, self.stop = folder, life, stop
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        samples = []
        if isinstance(batch, dict):
            batch, samples = batch["long"], [-1 - sample for sample in batch["short"][:, 0].tolist()]
        samples += batch[:, 0].tolist()
        loss = (self.layer(batch / SAMPLES) - batch[:, :1] / 10).square().mean()
        self.log("mean", loss, on_step=False, on_epoch=True)
        self.log("count", float(len(batch)), on_step=False, on_epoch=True, reduce_fx="sum")
        with open(self.folder / f"{self.life}-{self.global_rank}.jsonl", "a") as file:
            file.write(json.dumps([self.current_epoch, batch_idx, samples]) + "\n")
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.fit_progress.batches == self.stop:
            self.trainer.save_checkpoint(self.folder / "last.ckpt")
            os._exit(0)

    def on_train_epoch_end(self) -> None:
        if self.global_rank == 0:
            epoch = {name: float(self.trainer.callback_metrics[name]) for name in ("mean", "count")}
            (self.folder / f"epoch{self.current_epoch}.json").write_text(json.dumps(epoch))

    def on_train_end(self) -> None:
        if self.global_rank == 0:
            torch.save(self.layer.weight.tolist(), self.folder / "weights.pt")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def live(folder: Path, life: str, devices: int, stop: int, accumulate: int, batch_size: int, several: int) -> None:
    """Train in ``devices`` processes until batch ``stop``, from the checkpoint where there is one."""
    L.seed_everything(3, verbose=False)
    last = folder / "last.ckpt"
    strategy = "ddp" if devices > 1 else "auto"
    counts = {"max_epochs": EPOCHS, "accumulate_grad_batches": accumulate, "reload_dataloaders_every_n_epochs": 1}
    run = trainer(folder, devices=devices, strategy=strategy, **counts)
    size = batch_size or GLOBAL_BATCH // devices
    loader: Any = DataLoader(Samples(SAMPLES), size, shuffle=True)
    if several:
        loader = {"long": loader, "short": DataLoader(Samples(SAMPLES // 3), size, shuffle=True)}
    run.fit(Seeing(folder, life, stop), loader, ckpt_path=last if last.exists() else None)


Seen = dict[Any, list[float]]


def lives(
    folder: Path,
    plan: list[tuple[int, int]],
    accumulate: int = 1,
    batch_size: int = 0,
    apart: int = 0,
    several: bool = False,
) -> Seen:
    """Run lives of (devices, last batch) one after the other; returns the samples of every global batch.

    Args:
        apart: what to add to the numbers of batches for each life, where they may be the same.
        several: combine the loader with a shorter one, whose samples count as negative.
    """
    folder.mkdir()
    found: dict[Any, list[float]] = {}
    for number, (devices, stop) in enumerate(plan):
        arguments = folder, f"life{number}", devices, stop, accumulate, batch_size, int(several)
        if devices == 1 and stop == -1:
            live(*arguments)
        else:
            run_in_ranks(live, *arguments, devices=devices, timeout=60)
        found |= read(folder, number, devices, found, number * apart)
    return {key: sorted(samples) for key, samples in found.items()}


def read(folder: Path, number: int, devices: int, before: Seen, apart: int) -> Seen:
    """The samples of the global batches of one life; none of them was there ``before``."""
    found: dict[Any, list[float]] = {}
    for rank in range(devices):
        for line in (folder / f"life{number}-{rank}.jsonl").read_text().splitlines():
            epoch, batch, samples = json.loads(line)
            found.setdefault((epoch, batch + apart), []).extend(samples)
    assert not found.keys() & before.keys(), "a batch came twice"
    return found


def results(folder: Path) -> list[Any]:
    """Epoch values and weights at the end."""
    epochs = [list(json.loads((folder / f"epoch{e}.json").read_text()).values()) for e in range(EPOCHS)]
    return [*epochs, *torch.load(folder / "weights.pt")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Any, list[float]], list[Any]]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return lives(folder, [(2, -1)], accumulate=2), results(folder)


def test_from_two_processes_to_one_to_three(whole: Any, tmp_path: Path) -> None:
    seen, expected = whole
    for epoch in range(EPOCHS):
        every = [sample for (e, _), samples in seen.items() if e == epoch for sample in samples]
        assert sorted(every) == list(range(SAMPLES)), "each sample once an epoch"
    assert len({tuple(seen[e, 0]) for e in range(EPOCHS)}) == EPOCHS, "shuffled"
    # in the middle of an accumulation, then of an epoch
    assert lives(tmp_path / "run", [(2, 3), (1, 10), (3, -1)], accumulate=2) == seen
    for value, other in zip(results(tmp_path / "run"), expected, strict=True):
        assert value == pytest.approx(other, rel=1e-5)


@pytest.mark.faults
def test_combined_loaders(tmp_path: Path) -> None:
    seen = lives(tmp_path / "whole", [(2, -1)], several=True)
    for epoch in range(EPOCHS):
        every = Counter(s for (e, _), samples in seen.items() if e == epoch for s in samples)
        assert every == Counter({**dict.fromkeys(range(SAMPLES), 1), **dict.fromkeys(range(-SAMPLES // 3, 0), 3)})
    assert lives(tmp_path / "run", [(2, 3), (1, 10), (3, -1)], several=True) == seen


def test_from_one_process_to_two(tmp_path: Path) -> None:
    alone = lives(tmp_path / "alone", [(1, -1)])
    seen = lives(tmp_path / "run", [(1, 3), (2, 8), (1, -1)])
    first = {key: samples for key, samples in alone.items() if key[0] == 0}
    assert {key: samples for key, samples in seen.items() if key[0] == 0} == first
    for epoch in range(EPOCHS):
        every = [sample for (e, _), samples in seen.items() if e == epoch for sample in samples]
        assert sorted(every) == list(range(SAMPLES))


@pytest.mark.filterwarnings("ignore:All ranks together have")
def test_with_another_global_batch(tmp_path: Path) -> None:
    """Six samples a process, whatever their number: from batches of 12 to batches of 6, which is said."""
    seen = lives(tmp_path / "run", [(2, 4), (1, -1)], batch_size=6)
    for epoch in range(EPOCHS):
        samples = Counter(s for (e, _), batch in seen.items() if e == epoch for s in batch)
        assert samples == Counter(range(SAMPLES))
    assert [len(batch) for (e, _), batch in sorted(seen.items()) if e == 0] == [12] * 4 + [6] * 4
    assert max(batch for e, batch in seen if e == 0) == SAMPLES // 6 - 1  # the epoch ends with its last number


@pytest.mark.faults
@pytest.mark.parametrize("again", [False, True])
def test_with_another_global_batch_in_an_accumulation(tmp_path: Path, again: bool) -> None:
    """The gradients for which no optimizer had stepped are kept, so that each sample comes once."""
    plan = [(2, 5), (1, 8), (3, -1)] if again else [(2, 5), (3, -1)]
    seen = lives(tmp_path / "run", plan, accumulate=2, batch_size=6, apart=100)
    for epoch in range(EPOCHS):
        assert Counter(s for (e, _), b in seen.items() if e == epoch for s in b) == Counter(range(SAMPLES))


class Measuring(L.LightningModule):
    """Keeps a sum, a list and a mean of its batches in torchmetrics objects."""

    def __init__(self, folder: Path, stop: int) -> None:
        from torchmetrics import CatMetric, Metric, SumMetric  # takes seconds, and every process imports this file

        class Averaged(Metric):
            """A state that cannot be put together from the ranks': its mean has no weights."""

            def __init__(self) -> None:
                super().__init__()
                self.add_state("value", torch.zeros(()), dist_reduce_fx="mean")

            def update(self, samples: Tensor) -> None:
                self.value += len(samples)

            def compute(self) -> Tensor:
                return self.value

        super().__init__()
        self.folder, self.stop = folder, stop
        self.layer = nn.Linear(4, 1)
        self.sum, self.all, self.averaged = SumMetric(), CatMetric(), Averaged()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for metric in (self.sum, self.all, self.averaged):
            metric.update(batch[:, 0])
        return self.layer(batch / SAMPLES).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.fit_progress.batches == self.stop:
            self.trainer.save_checkpoint(self.folder / "last.ckpt")
            os._exit(0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def measure(folder: Path, devices: int, stop: int) -> None:
    strategy = "ddp" if devices > 1 else "auto"
    run = trainer(folder, devices=devices, strategy=strategy, max_epochs=1)
    run.fit(Measuring(folder, stop), DataLoader(Samples(SAMPLES), GLOBAL_BATCH // devices))


def test_torchmetrics_objects_of_two_processes_go_on_in_one(tmp_path: Path) -> None:
    run_in_ranks(measure, tmp_path, 2, 4, devices=2, timeout=60)
    module = Measuring(tmp_path, -1)
    run = trainer(tmp_path, max_epochs=1)
    with pytest.warns(UserWarning, match="'value' of the metric 'averaged' cannot be put together from 2 processes"):
        run.fit(module, DataLoader(Samples(SAMPLES), GLOBAL_BATCH), ckpt_path=tmp_path / "last.ckpt")
    assert module.sum.compute() == sum(range(SAMPLES))
    assert sorted(module.all.compute().tolist()) == list(range(SAMPLES))
    assert module.averaged.compute() == 2 * GLOBAL_BATCH, "the two batches after those of the two processes"
    assert module.averaged.update_count == 2
