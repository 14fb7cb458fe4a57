"""Rung 3 of 3: the same training without the loop; validation, logs, checkpoints and callbacks are now arguments.

python examples/ladder/3_trainer.py --losses trainer.txt
python examples/ladder/3_trainer.py --devices 2 --batch-size 32    # two processes, the same 64 images a step
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import treadle as L


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.losses: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = cross_entropy(self(images), targets)
        self.losses.append(self.all_gather(loss.detach()).mean().item())
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, targets = batch
        correct = (self(images).argmax(1) == targets).float()
        self.log("test accuracy", correct.mean(), batch_size=len(targets), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(args: argparse.Namespace) -> None:
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        max_epochs=args.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    L.seed_everything(1)

    pixels, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    train, test = random_split(digits, [1437, 360])
    order = torch.Generator().manual_seed(1)
    train_loader = DataLoader(train, args.batch_size, shuffle=True, generator=order, drop_last=True)
    test_loader = DataLoader(test, args.batch_size)

    model = Digits()
    trainer.fit(model, train_loader)
    metrics = trainer.test(model, test_loader, verbose=False)

    if trainer.is_global_zero:
        print(f"test accuracy {metrics[0]['test accuracy']:.3f}")
    if args.losses and trainer.is_global_zero:
        args.losses.write_text("".join(f"{loss.hex()}\n" for loss in model.losses))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--losses", type=Path, help="write the loss of every step there, as hexadecimal floats")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=1)
    main(parser.parse_args())
