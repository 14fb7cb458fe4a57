"""A module and a data module for the command lines of the tests, and a call that runs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import treadle as L
from treadle.cli import LightningCLI, LRSchedulerCallable, OptimizerCallable

QUIET = {
    "trainer": {
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
}


class Net(L.LightningModule):
    """A network.

    Args:
        hidden: The width.
        lr: The learning rate.
        encoder: Comes first.
    """

    def __init__(self, hidden: int = 8, lr: float = 0.1, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = encoder
        self.layers = nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, 1))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.layers(batch if self.encoder is None else self.encoder(batch)).pow(2).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("value", self.layers(batch).mean())

    def test_step(self, batch: Tensor, index: int) -> None:
        self.log("value", self.layers(batch).mean())

    def predict_step(self, batch: Tensor, index: int) -> Tensor:
        return batch.sum(1)


class WithOptimizer(Net):
    """Has an optimizer of its own."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Injected(Net):
    """Gets what makes optimizer and scheduler."""

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.SGD,
        scheduler: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
    ) -> None:
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}


class Data(L.LightningDataModule):
    """Random samples."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.width = 4

    def loader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(8, 4), batch_size=self.batch_size)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


def cli(
    *words: str, of: type[LightningCLI] = LightningCLI, model: Callable[..., Any] | None = Net, **kwargs: Any
) -> LightningCLI:
    """Make a command line of :class:`Net` and :class:`Data` and give it these words, after a quiet trainer's."""
    kwargs = {"datamodule_class": Data, "trainer_defaults": QUIET["trainer"], "run": False, **kwargs}
    return of(model, args=list(words), **kwargs)
