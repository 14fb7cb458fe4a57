"""ModelCheckpoint over folders that all ranks write: in the background, and at URLs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint
from tests.fabric.checkpoint.fetched import load
from tests.processes import run_in_ranks
from torch import Tensor, nn

import treadle as L
from treadle.callbacks import ModelCheckpoint
from treadle.checkpoint.find import find_checkpoint, find_newest
from treadle_fabric import AsyncCheckpointIO, CheckpointError, DistributedCheckpointIO
from treadle_fabric.checkpoint import remote_checkpoints_in
from treadle_fabric.checkpoint.distributed import saving


class Model(L.LightningModule):
    """Every weight is minus the number of steps made."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(20_000))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("loss", -float(self.global_step))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(folder: str, *, devices: int = 1, ckpt_path: str | None = None, steps: int = 6, **kwargs: Any) -> L.Trainer:
    saver = ModelCheckpoint(
        folder, "{step}", **{"monitor": "loss", "save_top_k": 2, "every_n_train_steps": 1, **kwargs}
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, max_steps=steps, logger=False, callbacks=saver, enable_progress_bar=False,
        enable_model_summary=False, plugins=AsyncCheckpointIO(DistributedCheckpointIO()),
    )  # fmt: skip
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.zeros(100, 1)), ckpt_path=ckpt_path)
    return trainer


def in_ranks(folder: str) -> None:
    for save_last in (True, "link"):
        at = os.path.join(folder, str(save_last))
        trainer = fit(at, devices=2, save_last=save_last)
        names = sorted(os.listdir(at))
        assert names == ["last.ckpt", "step=5.ckpt", "step=6.ckpt"]
        assert os.path.islink(f"{at}/last.ckpt") == (save_last == "link")
        trainer.strategy.teardown()
    at = os.path.join(folder, "True")
    trainer = fit(at, devices=2, save_last=True, ckpt_path="last", steps=7)
    assert trainer.global_step == 7 and sorted(os.listdir(at)) == ["last.ckpt", "step=6.ckpt", "step=7.ckpt"]
    trainer.strategy.teardown()
    # a write that fails on rank 1 is raised by both at the next save, and removes nothing
    write = saving.ShardedSave._write_files

    def fails(save: Any, ranks: Any) -> Any:
        if ranks.rank == 1 and "step=3" in save._failure:
            raise OSError(28, "No space left on device")
        return write(save, ranks)

    saving.ShardedSave._write_files = fails  # type: ignore[method-assign]
    at = os.path.join(folder, "fails")
    with pytest.raises(CheckpointError, match=r"step=3\.ckpt' was not written: rank 1: No space left"):
        fit(at, devices=2, monitor=None, save_top_k=1)
    assert [name for name in os.listdir(at) if not name.startswith(".")] == ["step=2.ckpt"]


def test_two_ranks_keep_the_best_and_the_last(tmp_path: Path) -> None:
    run_in_ranks(in_ranks, str(tmp_path))
    last = DistributedCheckpointIO().load_checkpoint(tmp_path / "link" / "last.ckpt")
    assert last["global_step"] == 6 and last["state_dict"]["weight"].eq(-6).all()


def test_the_best_and_the_last_at_a_url(tmp_path: Path) -> None:
    url = "memory://shared-checkpoints"
    try:
        trainer = fit(url, save_last=True)
        listed = sorted(each.removeprefix(f"{url}/") for each, _ in remote_checkpoints_in(url))
        assert listed == ["last.ckpt", "step=5.ckpt", "step=6.ckpt"]
        assert find_checkpoint("last", trainer.checkpoint_callbacks, [], url, fitting=True) == f"{url}/last.ckpt"
        assert find_checkpoint("best", trainer.checkpoint_callbacks, [], url, fitting=True) == f"{url}/step=6.ckpt"
        found = load(f"{url}/last.ckpt")
        assert found["global_step"] == 6 and found["state_dict"]["weight"].eq(-6).all()
        assert fit(url, save_last=True, ckpt_path="last", steps=8).global_step == 8
        assert find_newest(trainer.checkpoint_callbacks, [], None) == f"{url}/last.ckpt"
        listed = sorted(each.removeprefix(f"{url}/") for each, _ in remote_checkpoints_in(url))
        assert listed == ["last.ckpt", "step=7.ckpt", "step=8.ckpt"]  # those before are replaced
    finally:
        fsspec.filesystem("memory").rm("/shared-checkpoints", recursive=True)
