"""Two models and a data module, which a config names."""

from typing import Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Waves(LightningDataModule):
    """Noisy sines, and the next value of each.

    Args:
        length: The number of values of a series.
        count: The number of series.
        batch_size: The number of series in a batch.
    """

    def __init__(self, length: int = 16, count: int = 256, batch_size: int = 32):
        super().__init__()
        self.length, self.count, self.batch_size = length, count, batch_size

    def setup(self, stage: str):
        phase = torch.rand(self.count, 1) * 6.28
        time = torch.arange(self.length + 1) * 0.4
        series = torch.sin(time + phase) + 0.05 * torch.randn(self.count, self.length + 1)
        self.series = TensorDataset(series[:, :-1], series[:, -1:])

    def train_dataloader(self):
        return DataLoader(self.series, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.series, batch_size=2 * self.batch_size)

    test_dataloader = val_dataloader


class Forecaster(LightningModule):
    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
    ):
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.optimizer, self.scheduler = optimizer, scheduler

    def loss(self, batch):
        x, y = batch
        return nn.functional.huber_loss(self(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}


class Dense(Forecaster):
    def __init__(self, length: int = 16, hidden: int = 24, activation: Literal["relu", "tanh"] = "tanh", **kwargs):
        super().__init__(**kwargs)
        between = nn.Tanh() if activation == "tanh" else nn.ReLU()
        self.net = nn.Sequential(nn.Linear(length, hidden), between, nn.Linear(hidden, 1))

    def forward(self, x):
        return self.net(x)


class Convolution(Forecaster):
    def __init__(self, length: int = 16, channels: int = 8, **kwargs):
        super().__init__(**kwargs)
        self.net = nn.Sequential(
            nn.Conv1d(1, channels, 5), nn.ReLU(), nn.Flatten(), nn.Linear(channels * (length - 4), 1)
        )

    def forward(self, x):
        return self.net(x[:, None])
