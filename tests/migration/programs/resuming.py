"""Training that is stopped after two epochs and goes on in another process.

`python resuming.py` trains two epochs and writes checkpoints; `python resuming.py FILE` goes on from one of them.
"""

import json
import os
import sys

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Counter(Callback):
    def __init__(self):
        self.batches = 0

    def on_train_batch_end(self, *args):
        self.batches += 1

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state):
        self.batches = state["batches"]


class Classifier(LightningModule):
    def __init__(self, hidden: int = 24, lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, 10)
        )
        self.losses = []
        self.total = 0.0

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.losses.append(loss.item().hex())
        self.total += loss.item()
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x), y))

    def on_save_checkpoint(self, checkpoint):
        checkpoint["total"] = self.total

    def on_load_checkpoint(self, checkpoint):
        self.total = checkpoint["total"]

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9, weight_decay=1e-4)
        step = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": step, "interval": "step"}}


def main(ckpt_path=None):
    seed_everything(21)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model, counter = Classifier(), Counter()
    best = ModelCheckpoint("ckpt", "{epoch}-{step}", monitor="val_loss", save_top_k=-1, save_last=True)
    stopping = EarlyStopping("val_loss", patience=3)
    trainer = Trainer(
        max_epochs=2 if ckpt_path is None else 4,
        accelerator="cpu",
        callbacks=[counter, best, stopping],
        logger=False,
        enable_progress_bar=False,
    )
    train, val = TensorDataset(x[:1200], y[:1200]), TensorDataset(x[1200:], y[1200:])
    trainer.fit(model, DataLoader(train, 80, shuffle=True), DataLoader(val, 200), ckpt_path=ckpt_path)
    tested = trainer.validate(model, DataLoader(val, 200), ckpt_path="best", verbose=False)
    with open(os.environ["LOSSES"], "w") as file:
        json.dump(
            {
                "losses": model.losses,
                "total": model.total.hex(),
                "batches": counter.batches,
                "best": [os.path.basename(best.best_model_path), best.best_model_score.item().hex()],
                "kept": sorted(os.path.basename(path) for path in best.best_k_models),
                "stopping": [stopping.wait_count, stopping.best_score.item().hex()],
                "rate": trainer.optimizers[0].param_groups[0]["lr"].hex(),
                "at": [trainer.current_epoch, trainer.global_step],
                "metrics": {k: v.item().hex() for k, v in sorted(trainer.callback_metrics.items())},
                "validated": tested[0]["val_loss"].hex(),
            },
            file,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
