"""A Trainer whose checkpoints are also exported: for each that is kept there are weights that safetensors reads.

Tests of ``treadle_fabric.checkpoint.export.exporting``, as ModelCheckpoint uses it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import treadle as L
from treadle.callbacks import ModelCheckpoint
from treadle_fabric import AsyncCheckpointIO, DistributedCheckpointIO, ExportingCheckpointIO, TorchCheckpointIO


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 120)
        self.head = nn.Linear(120, 100, bias=False)
        self.head.weight = self.embedding.weight  # tied

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.embedding(x))
        return found


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = nn.functional.cross_entropy(self.model(batch), batch)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("io", [TorchCheckpointIO(), DistributedCheckpointIO()])
def test_each_checkpoint_that_is_kept_has_its_export(io: Any, background: bool, tmp_path: Path) -> None:
    store: Any = ExportingCheckpointIO(io, strip_prefix="model.")
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[AsyncCheckpointIO(store) if background else store],
        callbacks=ModelCheckpoint(tmp_path, "{epoch}", monitor="epoch", mode="max", save_top_k=2),
    )  # fmt: skip
    module = Module()
    trainer.fit(module, DataLoader(torch.arange(8), batch_size=4))
    assert sorted(os.listdir(tmp_path)) == ["epoch=1.ckpt", "epoch=1.hf", "epoch=2.ckpt", "epoch=2.hf"]
    stored = Module.load_from_checkpoint(tmp_path / "epoch=2.ckpt")
    for path in tmp_path.glob("*.ckpt"):
        store.remove_checkpoint(path) if path.name == "epoch=1.ckpt" else io.remove_checkpoint(path)
    weight = stored.model.head.weight  # nothing of the folder is read any more
    assert type(weight) is nn.Parameter and torch.equal(weight, module.model.head.weight)
    assert os.listdir(tmp_path) == ["epoch=2.hf"]
    net = Net()
    missing = net.load_state_dict(load_file(tmp_path / "epoch=2.hf" / "model.safetensors"), strict=False)
    assert missing.missing_keys == ["head.weight"] and not missing.unexpected_keys  # the tied one has one name
    assert torch.equal(net.head.weight, module.model.head.weight)


def test_the_last_one_has_its_own_export(tmp_path: Path) -> None:
    class Scored(Module):
        def on_train_epoch_end(self) -> None:
            self.log("score", float("315"[self.current_epoch]))

    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[ExportingCheckpointIO(strip_prefix="model.")],
        callbacks=ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="max", save_last=True),
    )  # fmt: skip
    trainer.fit(Scored(), DataLoader(torch.arange(8), batch_size=4))  # the second epoch is saved as `last` alone
    weights = Scored.load_from_checkpoint(tmp_path / "last.ckpt").model.head.weight
    exported = load_file(tmp_path / "last.hf" / "model.safetensors")
    assert torch.equal(exported["embedding.weight"], weights)
