"""A LightningModule in a hand-written loop on Fabric: move to the Trainer, or away from it, a piece at a time.

    python examples/migrate_module.py

The Trainer takes the same module unchanged (`--trainer` shows it). In the hand-written loop, `self.log` calls
`fabric.log`, and `fabric.call` calls a hook of all callbacks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import treadle as L
from treadle_fabric import Fabric
from treadle_fabric.loggers import CSVLogger


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = cross_entropy(self.net(images), targets)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        return (self.net(images).argmax(1) == targets).float().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


class EpochReport:
    """A callback for a hand-written loop: any object will do, and a hook is any name that the loop calls."""

    def on_epoch_end(self, epoch: int, accuracy: float) -> None:
        print(f"epoch {epoch}: validation accuracy {accuracy:.3f}")


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    pixels, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    train, val = random_split(digits, [1437, 360], torch.Generator().manual_seed(0))
    return DataLoader(train, 32, shuffle=True), DataLoader(val, 360)


def with_fabric(args: argparse.Namespace) -> None:
    logger = CSVLogger(args.out, name="fabric")
    fabric = Fabric(accelerator="cpu", devices=args.devices, callbacks=[EpochReport()], loggers=logger)
    fabric.launch()
    fabric.seed_everything(0)
    module = Classifier()
    model, optimizer = fabric.setup(module, module.configure_optimizers())
    train_loader, val_loader = fabric.setup_dataloaders(*loaders())

    for epoch in range(args.epochs):
        for batch_idx, batch in enumerate(train_loader):
            loss = model.training_step(batch, batch_idx)  # through the wrapper: precision and DDP apply to it
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            accuracies = [model.validation_step(batch, i) for i, batch in enumerate(val_loader)]
        model.train()
        accuracy = fabric.all_reduce(torch.stack(accuracies).mean())
        if fabric.is_global_zero:
            fabric.call("on_epoch_end", epoch, accuracy.item())

    if fabric.is_global_zero:
        logger.finalize("success")
        metrics = Path(logger.log_dir) / "metrics.csv"
        rows = metrics.read_text().splitlines()
        print(f"self.log wrote {len(rows) - 1} rows to {metrics}; the last: {rows[-1]}")


def with_trainer(args: argparse.Namespace) -> None:
    L.seed_everything(0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=args.devices,
        max_epochs=args.epochs,
        logger=CSVLogger(args.out, name="trainer"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), *loaders())
    print(f"train_loss {trainer.callback_metrics['train_loss']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/migrate"), help="folder for the logs")
    parser.add_argument("--trainer", action="store_true", help="the same module under the Trainer")
    args = parser.parse_args()
    (with_trainer if args.trainer else with_fabric)(args)
