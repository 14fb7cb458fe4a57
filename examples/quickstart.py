"""A small convolutional net learns handwritten digits, in under a minute on two CPU cores.

    python examples/quickstart.py

Trains with a validation split, writes TensorBoard and CSV logs, keeps the best checkpoint, tests it on images that
neither training nor the choice of the checkpoint has seen, and draws the curves from the CSV log.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

import treadle as L
from treadle.callbacks import ModelCheckpoint
from treadle_fabric.loggers import CSVLogger, TensorBoardLogger


class DigitNet(L.LightningModule):
    def __init__(self, width: int = 32, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * 2 * 2, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Turn images of shape (batch, 1, 8, 8) into class scores of shape (batch, 10)."""
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.measure("train", batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.measure("val", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.measure("test", batch)

    def measure(self, stage: str, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        scores = self(images)
        loss = cross_entropy(scores, labels)
        accuracy = (scores.argmax(1) == labels).float().mean()
        metrics = {f"{stage}_loss": loss, f"{stage}_acc": accuracy}
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


def digits() -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
    """Load 1797 images of 8x8 pixels, and split them into 1197 to train on, 240 to validate and 360 to test."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    train, val, test = random_split(
        TensorDataset(images, torch.tensor(labels)), [1197, 240, 360], torch.Generator().manual_seed(0)
    )
    return train, val, test


def read_curves(metrics_csv: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the (epoch, value) pairs of each metric, by the metric's name."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with metrics_csv.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("epoch", "step"):
                    curves.setdefault(name, []).append((int(float(row["epoch"])), float(value)))
    return curves


def draw_curves(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
    for axes, kind, title in ((loss, "loss", "cross-entropy"), (accuracy, "acc", "accuracy")):
        for stage, label in (("train", "training"), ("val", "validation")):
            epochs, values = zip(*curves[f"{stage}_{kind}"], strict=True)
            axes.plot(epochs, values, label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set_yscale("log")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    L.seed_everything(0)
    train, val, test = digits()
    csv_logger = CSVLogger(args.out, name="csv")
    checkpoint = ModelCheckpoint(
        dirpath=args.out / "checkpoints", filename="{epoch:02d}-{val_loss:.3f}", monitor="val_loss"
    )
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_epochs=args.epochs,
        logger=[TensorBoardLogger(args.out, name="tensorboard"), csv_logger],
        callbacks=[checkpoint],
        log_every_n_steps=10,
        default_root_dir=args.out,
    )
    trainer.fit(DigitNet(), DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=240))

    best = DigitNet.load_from_checkpoint(checkpoint.best_model_path)
    results = trainer.test(best, DataLoader(test, batch_size=360), verbose=False)

    curves = args.out / "curves.png"
    draw_curves(read_curves(Path(csv_logger.log_dir) / "metrics.csv"), curves)
    print(f"test accuracy    {results[0]['test_acc']:.4f} on {len(test)} images")
    print(f"logs             {args.out}  (tensorboard --logdir {args.out})")
    print(f"best checkpoint  {checkpoint.best_model_path}")
    print(f"curves           {curves}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything written")
    parser.add_argument("--accelerator", default="auto")
    main(parser.parse_args())
