"""Distributed data parallel on two CPU processes; on GPUs only `accelerator` changes.

python examples/ddp_cpu.py
torchrun --nproc-per-node 2 examples/ddp_cpu.py      # the same run, started by torchrun
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import treadle as L


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.seen = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        self.seen += len(targets)
        return cross_entropy(self.net(images), targets)

    def on_train_end(self) -> None:
        weights = torch.cat([parameter.detach().flatten() for parameter in self.parameters()])
        everywhere = self.all_gather(weights)
        same = bool((everywhere == everywhere[0]).all())
        print(f"rank {self.global_rank} (process {os.getpid()}) trained on {self.seen} images\n", end="", flush=True)
        self.print(f"weights equal on all {len(everywhere)} ranks: {same}")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, targets = batch
        correct = (self.net(images).argmax(1) == targets).float()
        # sync_dist: the mean over all ranks, each weighted by the images that it saw.
        self.log("test_acc", correct.mean(), batch_size=len(targets), sync_dist=True)
        self.log("test_images", float(len(targets)), reduce_fx="sum", sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(args: argparse.Namespace) -> None:
    L.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    train, test = random_split(digits, [1436, 361])
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="ddp",
        max_epochs=args.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier()
    trainer.fit(model, DataLoader(train, 32, shuffle=True))
    metrics = trainer.test(model, DataLoader(test, 32), verbose=False)[0]
    if trainer.is_global_zero:
        print(f"test accuracy {metrics['test_acc']:.3f} on {metrics['test_images']:.0f} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args())
