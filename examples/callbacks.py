"""Callbacks: early stopping, the best three checkpoints, the learning rate in the log, and one of your own.

python examples/callbacks.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import treadle as L
from treadle.callbacks import Callback, EarlyStopping, LambdaCallback, LearningRateMonitor, ModelCheckpoint
from treadle_fabric.loggers import CSVLogger


class EpochTimes(Callback):
    """Measures the seconds of each epoch. The list is in every checkpoint, so a resumed run adds to it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]


class Classifier(L.LightningModule):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = cross_entropy(self.net(images), targets)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, targets = batch
        self.log("val_loss", cross_entropy(self.net(images), targets), batch_size=len(targets))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)]


def main(args: argparse.Namespace) -> None:
    L.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    train, val = random_split(digits, [1437, 360])
    loaders = DataLoader(train, 64, shuffle=True), DataLoader(val, 360)

    def make_trainer() -> tuple[L.Trainer, EpochTimes, ModelCheckpoint]:
        times = EpochTimes()
        checkpoint = ModelCheckpoint(
            args.out / "checkpoints", "{epoch}-{val_loss:.4f}", monitor="val_loss", save_top_k=3, save_last=True
        )
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=100,
            callbacks=[
                EarlyStopping("val_loss", patience=3, min_delta=1e-3),
                LambdaCallback(on_fit_start=lambda trainer, module: print("training begins")),
                LearningRateMonitor("epoch"),
                times,
                checkpoint,
            ],
            logger=CSVLogger(args.out, name="log"),
            log_every_n_steps=10,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        return trainer, times, checkpoint

    trainer, times, checkpoint = make_trainer()
    trainer.fit(Classifier(), *loaders)
    print(f"stopped after {trainer.current_epoch} epochs; best val_loss {checkpoint.best_model_score:.4f}")
    for path, score in sorted(checkpoint.best_k_models.items(), key=lambda item: item[1].item()):
        print(f"  kept {Path(path).name} ({score:.4f})")
    print(f"  and {Path(checkpoint.last_model_path).name}, the last")
    print(f"an epoch took {1000 * sum(times.seconds) / len(times.seconds):.0f} ms")
    print(f"the learning rate is a column of {Path(trainer.log_dir or '.') / 'metrics.csv'}")

    # Weights, optimizer, data and callbacks go on where the checkpoint left them: it stops after the same epoch again.
    best = checkpoint.best_model_path
    trainer, times, checkpoint = make_trainer()
    trainer.fit(Classifier(), *loaders, ckpt_path=best)
    print(f"resumed, and stopped after {trainer.current_epoch} epochs; {len(times.seconds)} measured in all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/callbacks"), help="folder for everything written")
    main(parser.parse_args())
