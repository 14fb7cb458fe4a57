"""Evaluation and prediction where ranks work together in every forward pass, and have unequal numbers of batches.

Tests of ``treadle.loops.lockstep``, ``treadle_fabric.strategies.sharding.engine``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import treadle as L
from treadle_fabric import Fabric
from treadle_fabric.strategies import FSDPStrategy


class Two(L.LightningModule):
    """Two layers, each gathered on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(0.1)
        self.ran = 0

    def loss(self, batch: Tensor) -> Tensor:
        assert self.first.weight.shape == (3, 4) and type(self.first.weight) is not Tensor
        return self.second(self.first(batch / 10)).square().mean()

    def training_step(self, batch: Tensor) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.ran += 1
        self.log("loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.ran += 1
        return self.second(self.first(batch)).sum(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Numbers(IterableDataset[Tensor]):
    """A stream that gives rank 1 fewer batches than rank 0, and has no length."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((2, 4), float(i)) for i in range(4 - 3 * self.trainer.global_rank))


def trainer(*, ranks: int = 2, **arguments: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "max_epochs": 1}
    strategy = {"devices": ranks, "strategy": FSDPStrategy(policy={nn.Linear})} if ranks > 1 else {"devices": 1}
    return L.Trainer(accelerator="cpu", **strategy, **quiet | arguments)


class Picks(Two):
    """Has no use for some batches, from the first one on."""

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch[0, 0] > 1:
            super().validation_step(batch, batch_idx)


def _evaluates() -> None:
    loaders = [loader(5), loader(1), loader(8)]
    alone, together = trainer(ranks=1), trainer()
    expected = alone.validate(Two(), loaders, verbose=False)
    module = Two()
    found = together.validate(module, loaders, verbose=False)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs)
    assert module.ran == (2 + 1 + 2, 1 + 0 + 2)[together.global_rank]
    picks = [
        alone.validate(Picks(), loader(5, 1), verbose=False),
        together.validate(Picks(), loader(5, 1), verbose=False),
    ]
    assert picks[0][0] == pytest.approx(picks[1][0])
    found = together.test(module, DataLoader(Numbers(together), batch_size=None), verbose=False)
    weights = [sum(range(4)), 0][together.global_rank]
    assert module.ran == (5 + 4, 3 + 1)[together.global_rank] and weights >= 0
    limited = trainer(limit_val_batches=1)
    limited.validate(module, loaders, verbose=False)
    assert module.ran == (9 + 3, 4 + 2)[together.global_rank]
    fitted = trainer(num_sanity_val_steps=2, val_check_interval=2)
    fitted.fit(module, loader(8), loaders)  # after evaluations under inference mode
    assert fitted.global_step == 2


def test_ranks_without_a_batch_take_part_in_the_passes_of_the_others() -> None:
    run_in_ranks(_evaluates)


def _predicts() -> None:
    loaders = [loader(5), loader(1), loader(8)]
    alone, together = trainer(ranks=1), trainer()
    expected = alone.predict(Two(), loaders)
    found = together.predict(Two(), loaders)
    streamed = [*together.predict(Two(), loaders, return_predictions="stream")]
    for mine in (found, _split(streamed, [3, 1, 4])):
        assert [[t.tolist() for t in one] for one in mine] == [[t.tolist() for t in one] for one in expected]
    # of loaders that share themselves out, each rank asks for the outputs of its own, or stops asking
    stream = [DataLoader(Numbers(together), batch_size=None), DataLoader(Numbers(together), batch_size=None)]
    outputs = together.predict(Two(), stream, return_predictions="stream")
    if together.global_rank == 0:
        assert len([*outputs]) == 8
    else:
        next(outputs)
        outputs.close()
    outputs = together.predict(Two(), stream, return_predictions="stream")
    if together.global_rank == 0:
        next(outputs)
        outputs.close()
    else:
        assert len([*outputs]) == 2


def _split(streamed: list[Any], sizes: list[int]) -> list[list[Any]]:
    found = iter(streamed)
    return [[next(found) for _ in range(size)] for size in sizes]


def test_predictions_in_lockstep() -> None:
    run_in_ranks(_predicts)


class FailsInBatch1(Two):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 1:
            raise ZeroDivisionError("in the batch of one rank")


def _fails() -> None:
    together = trainer()
    error = ZeroDivisionError if together.global_rank == 0 else RuntimeError  # its wait has ended
    with pytest.raises(error):
        together.validate(FailsInBatch1(), loader(3, 1), verbose=False)


def test_an_error_of_one_rank_ends_the_others() -> None:
    run_in_ranks(_fails, timeout=30)


class Terminated(Two):
    """Rank 0 is asked to terminate in the first batch of a validation that has more batches there than on rank 1."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.trainer.global_rank == 0 and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def _is_terminated() -> None:
    module, together = Terminated(), trainer(num_sanity_val_steps=0)
    with pytest.raises(SystemExit):
        together.fit(module, loader(8), loader(41, 1))
    assert 1 <= module.ran < 20


def test_a_validation_that_is_asked_to_terminate_ends_on_all_ranks() -> None:
    run_in_ranks(_is_terminated, timeout=40)


def _evaluates_by_hand() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=FSDPStrategy(policy={nn.Linear}))
    fabric.launch()
    model = fabric.setup(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    with torch.no_grad():
        batches = [model(batch) for batch in fabric.setup_dataloaders(loader(5, 1))]
    assert len(batches) == 3  # on both ranks
    fabric.strategy.teardown()


def test_fabrics_loaders_have_equal_numbers_of_batches() -> None:
    run_in_ranks(_evaluates_by_hand)
