"""Two processes, started by the strategy, with everything about them said in its arguments."""

import json
import os
import sys
from datetime import timedelta

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision, TorchCheckpointIO
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class LoudCheckpointIO(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        print("saving", os.path.basename(path))
        super().save_checkpoint(checkpoint, path, storage_options)


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 20), nn.SiLU(), nn.Linear(20, 1))
        self.unused = nn.Linear(3, 3)
        self.losses, self.means, self.gathered = [], [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x).squeeze(1), y)
        self.log("train", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("largest", loss, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")
        self.losses.append(loss.item().hex())
        self.gathered.append([v.hex() for v in self.all_gather(loss.detach()).tolist()])
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val", nn.functional.mse_loss(self.net(x).squeeze(1), y), sync_dist=True)

    def on_validation_epoch_end(self):
        self.means.append(self.trainer.strategy.reduce(torch.tensor(self.global_rank + 1.0), reduce_op="sum").item())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main():
    own_sampler = "--own-sampler" in sys.argv
    seed_everything(5, workers=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(320, 10, generator=generator)
    y = x.sum(1) + 0.1 * torch.randn(320, generator=generator)
    train, val = TensorDataset(x[:256], y[:256]), TensorDataset(x[256:], y[256:])

    model = Regression()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(
            process_group_backend="gloo",
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
            bucket_cap_mb=1,
            timeout=timedelta(seconds=60),
        ),
        plugins=[LightningEnvironment(), MixedPrecision("bf16-mixed", "cpu"), LoudCheckpointIO()],
        max_epochs=2,
        use_distributed_sampler=not own_sampler,
        callbacks=ModelCheckpoint("ckpt", monitor="val"),
        enable_progress_bar=False,
        logger=False,
        gradient_clip_val=1.0,
        gradient_clip_algorithm="value",
    )
    sampler = DistributedSampler(train, 2, trainer.global_rank, shuffle=True, seed=9) if own_sampler else None
    trainer.fit(model, DataLoader(train, 16, sampler=sampler), DataLoader(val, 16))
    if trainer.is_global_zero:
        best = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
        with open(os.environ["LOSSES"], "w") as file:
            json.dump(
                {
                    "losses": model.losses,
                    "gathered": model.gathered,
                    "sums": model.means,
                    "metrics": {k: v.item().hex() for k, v in sorted(trainer.callback_metrics.items())},
                    "steps": trainer.global_step,
                    "world": [trainer.world_size, trainer.num_devices, trainer.strategy.root_device.type],
                    "saved": {k: v.double().sum().item().hex() for k, v in best["state_dict"].items()},
                },
                file,
            )


if __name__ == "__main__":
    main()
