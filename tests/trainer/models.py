"""The small module, loaders and trainer that the trainer's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import treadle as L


class Samples(Dataset[Tensor]):
    """``n`` vectors of ``width`` numbers, the same in every process; sample ``i`` is filled with ``i``."""

    def __init__(self, n: int, width: int = 4) -> None:
        self.n, self.width = n, width

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((self.width,), float(index))


def loader(n: int = 8, batch_size: int = 2, **kwargs: Any) -> DataLoader[Tensor]:
    """Batches of ``(batch_size, 4)``; batch ``b`` starts with the sample ``b * batch_size``."""
    return DataLoader(Samples(n), batch_size=batch_size, **kwargs)


class Net(L.LightningModule):
    """One linear layer with every step; it overrides no hook, and logs its loss in each stage."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = lr
        self.layer = nn.Linear(4, 2)
        with torch.no_grad():
            for p in self.layer.parameters():
                p.fill_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def loss(self, batch: Tensor) -> Tensor:
        return self(batch / 10).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def trainer(tmp_path: Path, **kwargs: Any) -> L.Trainer:
    """A quiet trainer for one CPU process and one epoch, without logger and checkpoints; ``kwargs`` win."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "default_root_dir": tmp_path,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{**quiet, **kwargs})
