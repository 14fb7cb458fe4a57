"""A data module, hyper-parameters, and a model that comes back from its checkpoint with some of them changed."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_summary import ModelSummary
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset


class DigitsDataModule(pl.LightningDataModule):
    def __init__(self, folder: str | Path = "data", batch_size: int = 50, num_workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        path = Path(self.hparams.folder)
        path.mkdir(exist_ok=True)
        torch.save(torch.tensor(load_digits().data, dtype=torch.float32) / 16, path / "digits.pt")

    def setup(self, stage: str) -> None:
        images = TensorDataset(torch.load(Path(self.hparams.folder) / "digits.pt"))
        if stage in ("fit", "validate"):
            self.train = Subset(images, range(1000))
            self.val = Subset(images, range(1000, 1400))
        if stage == "test":
            self.test = Subset(images, range(1400, len(images)))
        if stage == "predict":
            self.pictures = Subset(images, range(10))

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> list[DataLoader]:
        half = len(self.val) // 2
        return [self._loader(Subset(self.val, range(half))), self._loader(Subset(self.val, range(half, len(self.val))))]

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test)

    def predict_dataloader(self) -> DataLoader:
        return self._loader(self.pictures)

    def _loader(self, dataset, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            dataset, batch_size=self.hparams.batch_size, shuffle=shuffle, num_workers=self.hparams.num_workers
        )


class AutoEncoder(pl.LightningModule):
    def __init__(self, config: argparse.Namespace, encoder: nn.Module, noise: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="encoder")
        self.encoder = encoder
        self.decoder = nn.Sequential(nn.Linear(config.code, config.hidden), nn.GELU(), nn.Linear(config.hidden, 64))
        self.example_input_array = torch.zeros(1, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        noisy = x + self.hparams.noise * torch.randn_like(x)
        loss = nn.functional.mse_loss(self(noisy), x)
        self.log("train/loss", loss, on_epoch=True)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx):
        (x,) = batch
        self.log("val/loss", nn.functional.mse_loss(self(x), x))
        self.log("loss", nn.functional.l1_loss(self(x), x), add_dataloader_idx=False) if dataloader_idx == 0 else None

    def test_step(self, batch, batch_idx):
        (x,) = batch
        self.log_dict({"test/mse": nn.functional.mse_loss(self(x), x), "test/noise": self.hparams.noise})

    def predict_step(self, batch, batch_idx):
        return self.encoder(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.config.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)]


def encoder(config: argparse.Namespace) -> nn.Module:
    return nn.Sequential(nn.Linear(64, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.code))


if __name__ == "__main__":
    pl.seed_everything(7)
    config = argparse.Namespace(hidden=24, code=6, lr=0.5)
    model = AutoEncoder(config, encoder(config))
    data = DigitsDataModule()
    best = ModelCheckpoint(monitor="val/loss/dataloader_idx_1", mode="min", save_last=True, dirpath="checkpoints")
    trainer = pl.Trainer(
        max_epochs=4, accelerator="cpu", callbacks=best, val_check_interval=0.5, enable_progress_bar=False
    )
    trainer.fit(model, datamodule=data)
    fitted = {name: float(value).hex() for name, value in sorted(trainer.callback_metrics.items())}

    (tested,) = trainer.test(ckpt_path="best", datamodule=data, weights_only=False)
    again = AutoEncoder.load_from_checkpoint(
        best.best_model_path, encoder=encoder(config), noise=0.25, weights_only=False
    )
    (reloaded,) = pl.Trainer(logger=False, enable_checkpointing=False).test(again, data, verbose=False)
    codes = pl.Trainer(logger=False).predict(again, datamodule=data)
    restored = DigitsDataModule.load_from_checkpoint("checkpoints/last.ckpt", batch_size=20, weights_only=False)

    Path(os.environ["LOSSES"]).write_text(
        json.dumps(
            {
                "fitted": fitted,
                "best": Path(best.best_model_path).name,
                "score": best.best_model_score.item().hex(),
                "tested": {name: value.hex() for name, value in tested.items()},
                "reloaded": {name: value.hex() for name, value in reloaded.items()},
                "codes": [value.hex() for value in torch.cat(codes).flatten().tolist()],
                "hparams": [again.hparams.noise, vars(again.hparams.config), dict(restored.hparams)],
                "parameters": ModelSummary(model).total_parameters,
            }
        )
    )
