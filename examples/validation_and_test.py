"""Validation on two sets, a test on unseen data, and predictions, from one datamodule.

python examples/validation_and_test.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

import treadle as L


class DigitsData(L.LightningDataModule):
    """Splits the digits for training, validation, test and prediction; a second validation set has noise added."""

    def __init__(self, batch_size: int = 32, noise: float = 0.3) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        pixels, labels = load_digits(return_X_y=True)
        images, targets = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
        shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)) * self.hparams.noise
        clean, noisy = TensorDataset(images, targets), TensorDataset(images + noise, targets)
        train, val, test = shuffled.split([1197, 240, 360])
        self.train = Subset(clean, train.tolist())
        self.val = Subset(clean, val.tolist())
        self.val_noisy = Subset(noisy, val.tolist())
        self.test = Subset(clean, test.tolist())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(self.val, batch_size=120), DataLoader(self.val_noisy, 120)]

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=120)

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=120)


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = cross_entropy(self.net(images), targets)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        # With several loaders there is one value per loader: val_acc/dataloader_idx_0 and val_acc/dataloader_idx_1.
        self.log("val_acc", self.accuracy(batch), batch_size=len(batch[0]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_acc", self.accuracy(batch), batch_size=len(batch[0]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        return self.net(images).softmax(1)

    def accuracy(self, batch: list[Tensor]) -> Tensor:
        images, targets = batch
        return (self.net(images).argmax(1) == targets).float().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(args: argparse.Namespace) -> None:
    L.seed_everything(0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=args.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = Classifier(), DigitsData()

    before = trainer.validate(model, datamodule=data, verbose=False)
    trainer.fit(model, datamodule=data)
    after = trainer.validate(model, datamodule=data, verbose=False)
    for i, name in enumerate(("clean", "noisy")):
        key = f"val_acc/dataloader_idx_{i}"
        print(f"validation accuracy, {name}: {before[i][key]:.3f} before training, {after[i][key]:.3f} after")

    results = trainer.test(model, datamodule=data)
    print(f"test accuracy: {results[0]['test_acc']:.3f}")

    predictions = trainer.predict(model, datamodule=data)
    assert predictions is not None
    confidence, digit = torch.cat(predictions).max(1)
    least = confidence.argmin()
    print(f"{len(digit)} predictions; the least certain is a {digit[least]}, at {confidence[least]:.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    main(parser.parse_args())
