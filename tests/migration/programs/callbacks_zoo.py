"""Everything hangs on callbacks: the library's, and four of the author's own."""

import json
import os

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn


class Digits(L.LightningDataModule):
    def setup(self, stage=None):
        digits = load_digits()
        x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        y = torch.tensor(digits.target)
        self.parts = torch.utils.data.random_split(
            torch.utils.data.TensorDataset(x, y), [0.5, 0.2, 0.3], torch.Generator().manual_seed(1)
        )

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.parts[0], batch_size=64, shuffle=True)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.parts[1], batch_size=128)


class Net(L.LightningModule):
    def __init__(self, lr=0.02):
        super().__init__()
        self.lr = lr
        self.backbone = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(72, 10)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        self.log_dict(
            {"val_loss": nn.functional.cross_entropy(out, y), "val_acc": (out.argmax(-1) == y).float().mean()}
        )

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Recorder(Callback):
    """Notes each loss, and counts what it is told of."""

    def __init__(self):
        self.losses, self.validated, self.calls = [], [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item().hex())

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validated.append({k: v.item().hex() for k, v in sorted(trainer.callback_metrics.items())})

    def state_dict(self):
        return {"seen": len(self.losses)}

    def setup(self, trainer, pl_module, stage):
        self.calls["setup for fit"] = self.calls.get("setup for fit", 0) + (stage == "fit")

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.calls["zero_grad"] = self.calls.get("zero_grad", 0) + 1

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.calls["step"] = self.calls.get("step", 0) + 1


class SkipEveryTenth(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 3 and batch_idx == 10:
            return -1


class NoisyGradients(Callback):
    def on_after_backward(self, trainer, pl_module):
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(torch.randn_like(parameter), alpha=1e-3)


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step >= self.step:
            trainer.should_stop = True


def finetuning():
    L.seed_everything(3, verbose=False)
    recorder, model = Recorder(), Net()
    checkpoints = [
        ModelCheckpoint("ckpt", "top-{epoch}-{step}", monitor="val_acc", mode="max", save_top_k=2),
        ModelCheckpoint("ckpt", "every-{step}", every_n_train_steps=10, save_top_k=-1),
    ]
    lr_monitor = LearningRateMonitor("step", log_momentum=True)
    stopping = EarlyStopping("val_loss", min_delta=0.3, patience=2, verbose=True)
    trainer = L.Trainer(
        max_epochs=12,
        callbacks=[
            recorder,
            *checkpoints,
            lr_monitor,
            stopping,
            BackboneFinetuning(
                unfreeze_backbone_at_epoch=2, lambda_func=lambda epoch: 1.2, backbone_initial_ratio_lr=0.2
            ),
            GradientAccumulationScheduler({0: 1, 2: 3}),
            SkipEveryTenth(),
            NoisyGradients(),
            Timer("00:01:00:00"),
            ModelSummary(max_depth=2),
            LambdaCallback(on_train_start=lambda trainer, module: print("here we go", trainer.num_training_batches)),
        ],
        logger=CSVLogger("logs"),
        log_every_n_steps=3,
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=Digits())
    return {
        "losses": recorder.losses,
        "validated": recorder.validated,
        "calls": recorder.calls,
        "stopped": [stopping.stopped_epoch, stopping.wait_count, trainer.current_epoch, trainer.global_step],
        "best": checkpoints[0].best_model_score.item().hex(),
        "files": sorted(os.listdir("ckpt")),
        "rates": {k: [values[0].hex(), values[-1].hex()] for k, values in sorted(lr_monitor.lrs.items())},
        "groups": len(trainer.optimizers[0].param_groups),
    }


def stopped_within():
    L.seed_everything(4, verbose=False)
    recorder = Recorder()
    trainer = L.Trainer(
        max_epochs=5, min_epochs=1, callbacks=[recorder, StopAt(20)], logger=False, enable_checkpointing=False
    )
    trainer.fit(Net(), Digits())
    return {
        "losses": recorder.losses,
        "validated": recorder.validated,
        "at": [trainer.current_epoch, trainer.global_step],
    }


def averaging():
    L.seed_everything(5, verbose=False)
    recorder, model = Recorder(), Net()
    averaged = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=2)
    trainer = L.Trainer(max_epochs=5, callbacks=[recorder, averaged], logger=False, enable_progress_bar=False)
    trainer.fit(model, datamodule=Digits())
    weights = torch.cat([p.detach().double().flatten() for p in model.parameters()]).sum().item()
    return {"losses": recorder.losses, "validated": recorder.validated, "weights": weights.hex()}


if __name__ == "__main__":
    with open(os.environ["LOSSES"], "w") as file:
        json.dump({"finetuning": finetuning(), "stopped within": stopped_within(), "averaging": averaging()}, file)
