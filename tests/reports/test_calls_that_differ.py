"""Ranks called fit with different arguments, and failed with an error that had nothing to do with that, or hung.

Tests of ``treadle.trainer.preflight``, ``treadle_fabric.coordination.on_rank_zero``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import loader

import treadle as L
from treadle_fabric import Fabric, MisconfigurationException
from treadle_fabric.coordination import first_different

pytestmark = pytest.mark.timeout(90)


class Net(L.LightningModule):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(torch.ones(2, 4)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()


class Data(L.LightningDataModule):
    """Batches of its own."""

    def train_dataloader(self) -> Any:
        return loader()


def trainer(**kwargs: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_steps": 1, "limit_val_batches": 0}
    return L.Trainer(**quiet | kwargs)


Calls = Callable[[int], object]
CALLS: dict[str, tuple[Calls, str]] = {
    "a path on rank 1": (
        lambda rank: trainer().fit(Net(), ckpt_path="a.ckpt" if rank else None),
        "Rank 0 runs fit with ckpt_path=None, but rank 1 runs fit with ckpt_path='a.ckpt': every rank must",
    ),
    "a path on rank 0": (
        lambda rank: trainer().fit(Net(), ckpt_path=None if rank else "a.ckpt"),
        "Rank 0 runs fit with ckpt_path='a.ckpt', but rank 1 runs fit with ckpt_path=None: every rank must",
    ),
    "a path of an evaluation": (
        lambda rank: trainer().validate(Net(), ckpt_path="a.ckpt" if rank else None),
        "Rank 0 runs validate with ckpt_path=None, but rank 1 runs validate with ckpt_path='a.ckpt'",
    ),
    "a data module": (
        lambda rank: trainer().fit(Net(), datamodule=Data() if rank else None),
        "Rank 0 runs fit with datamodule=None, but rank 1 runs fit with datamodule='Data'",
    ),
    "auto_resume": (
        lambda rank: trainer(auto_resume=rank == 1).fit(Net()),
        "Rank 0 runs fit with auto_resume=False, but rank 1 runs fit with auto_resume=True",
    ),
    "another stage": (
        lambda rank: trainer().validate(Net()) if rank else trainer().fit(Net()),
        "Rank 0 runs fit with stage='fit', but rank 1 runs validate with stage='validate'",
    ),
}


def _call(what: str) -> None:
    call, sentence = CALLS[what]
    with pytest.raises(MisconfigurationException) as raised:
        call(int(os.environ["LOCAL_RANK"]))
    assert sentence in str(raised.value)
    assert ("auto_resume=True) or" in str(raised.value)) == ("path" in what)


@pytest.mark.parametrize("what", CALLS)
def test_every_rank_is_told_how_the_calls_differ(what: str) -> None:
    run_in_ranks(_call, what)


def _resume(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    first = trainer(default_root_dir=folder)
    first.fit(Net())
    first.save_checkpoint(folder / "a.ckpt")
    second = trainer(max_steps=2)
    second.fit(Net(), ckpt_path=folder / ("b.ckpt" if rank else "a.ckpt"))
    assert second.global_step == 2
    assert second.ckpt_path == str(folder / "a.ckpt")


def test_of_two_paths_that_of_rank_0_counts_and_the_other_is_named(tmp_path: Path) -> None:
    said = run_in_ranks(_resume, tmp_path)
    assert said.count("b.ckpt' on rank 1: all ranks start from rank 0's.") == 1


def _compare() -> None:
    fabric = Fabric(accelerator="cpu", devices=3, strategy="ddp")
    fabric.launch()
    rank = fabric.global_rank
    assert first_different(fabric, ("a", 1)) is None
    assert first_different(fabric, rank == 2) == 2
    assert first_different(fabric, rank == 0) == 1
    assert first_different(fabric, {"rank": rank}) == 1


def test_the_first_rank_with_another_value_is_found() -> None:
    run_in_ranks(_compare, devices=3)


def _mix() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    if fabric.global_rank == 0:
        torch.distributed.broadcast(torch.full((2048,), 7, dtype=torch.uint8), 0)
        return
    with pytest.raises(MisconfigurationException, match="do not make the same calls in the same order"):
        fabric.broadcast(None)


def test_what_another_collective_sent_is_not_taken_for_an_object() -> None:
    run_in_ranks(_mix)
