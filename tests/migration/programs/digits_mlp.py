"""A beginner's program: one file, one module, everything at the top level."""

import json
import os

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

L.seed_everything(42)

digits = load_digits()
x_train, x_val, y_train, y_val = train_test_split(
    digits.data.astype("float32") / 16, digits.target, test_size=0.25, random_state=0
)
train_set = TensorDataset(torch.from_numpy(x_train), torch.from_numpy(y_train))
val_set = TensorDataset(torch.from_numpy(x_val), torch.from_numpy(y_val))
train_loader = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
val_loader = DataLoader(val_set, batch_size=100)

losses = []


class LitDigits(L.LightningModule):
    def __init__(self, hidden=32, lr=3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 10))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y), prog_bar=True)
        self.log("val_acc", (logits.argmax(1) == y).float().mean(), prog_bar=True)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_acc", (self(x).argmax(1) == y).float().mean())

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch[0]).softmax(1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


model = LitDigits()
trainer = L.Trainer(max_epochs=3, accelerator="cpu", log_every_n_steps=5, default_root_dir="runs")
trainer.fit(model, train_loader, val_loader)
metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
results = trainer.test(model, val_loader, verbose=False)
predictions = torch.cat(trainer.predict(model, val_loader))

with open(os.environ["LOSSES"], "w") as file:
    json.dump(
        {
            "losses": [loss.hex() for loss in losses],
            "metrics": {name: value.hex() for name, value in sorted(metrics.items())},
            "test": results[0]["test_acc"].hex(),
            "predictions": predictions.double().sum(0)[3].item().hex(),
            "steps": trainer.global_step,
            "epoch": trainer.current_epoch,
        },
        file,
    )
