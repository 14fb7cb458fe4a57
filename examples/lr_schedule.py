"""Learning-rate schedules: one that steps with every batch, one with every epoch, one that waits for a metric.

python examples/lr_schedule.py            # all three
python examples/lr_schedule.py plateau
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset, random_split

import treadle as L
from treadle.callbacks import Callback


class Classifier(L.LightningModule):
    def __init__(self, schedule: str) -> None:
        super().__init__()
        self.schedule = schedule
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        return cross_entropy(self.net(images), targets)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, targets = batch
        self.log("val_loss", cross_entropy(self.net(images), targets), batch_size=len(targets))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        if self.schedule == "one-cycle":
            steps = int(self.trainer.estimated_stepping_batches)
            one_cycle = OneCycleLR(optimizer, max_lr=0.4, total_steps=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one_cycle, "interval": "step"}}
        if self.schedule == "cosine":
            return [optimizer], [CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs or 1)]
        plateau = ReduceLROnPlateau(optimizer, factor=0.3, patience=1, threshold=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class RecordRates(Callback):
    """Records the learning rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def sparkline(values: list[float], width: int = 60) -> str:
    picked = [values[i * len(values) // width] for i in range(width)]
    return "".join("▁▂▃▄▅▆▇█"[int(7 * value / max(picked))] for value in picked)


def run(schedule: str, epochs: int) -> None:
    L.seed_everything(0, verbose=False)
    pixels, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    train, val = random_split(digits, [1437, 360])
    record = RecordRates()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=[record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(schedule), DataLoader(train, 64, shuffle=True), DataLoader(val, 360))
    first, highest, last = record.rates[0], max(record.rates), record.rates[-1]
    print(f"{schedule:9} {sparkline(record.rates)} {first:.3g}, at most {highest:.3g}, at the end {last:.2g};", end=" ")
    print(f"val_loss {trainer.callback_metrics['val_loss']:.4f}")


if __name__ == "__main__":
    names = ["one-cycle", "cosine", "plateau"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schedules", nargs="*", default=names, help=", ".join(names))
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    for name in args.schedules:
        run(name, args.epochs)
