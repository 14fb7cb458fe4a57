"""Rung 2 of 3: the same loop on Fabric, so that it runs on any device or several devices, in any precision.

    python examples/ladder/2_fabric.py --losses fabric.txt
    python examples/ladder/2_fabric.py --devices 2 --batch-size 32     # two processes, the same 64 images a step

Compare with `diff examples/ladder/2_fabric.py examples/ladder/3_trainer.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

from treadle_fabric import Fabric


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def main(args: argparse.Namespace) -> None:
    fabric = Fabric(accelerator=args.accelerator, devices=args.devices)
    fabric.launch()
    fabric.seed_everything(1)

    pixels, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    train, test = random_split(digits, [1437, 360])
    order = torch.Generator().manual_seed(1)
    train_loader = DataLoader(train, args.batch_size, shuffle=True, generator=order, drop_last=True)
    test_loader = DataLoader(test, args.batch_size)
    train_loader, test_loader = fabric.setup_dataloaders(train_loader, test_loader)

    model = Digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)

    losses = []
    for _ in range(args.epochs):
        for images, targets in train_loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), targets)
            fabric.backward(loss)
            optimizer.step()
            losses.append(fabric.all_reduce(loss.detach()).item())

    model.eval()
    correct = torch.zeros((), device=fabric.device)
    with torch.no_grad():
        for images, targets in test_loader:
            correct += (model(images).argmax(1) == targets).sum()
    correct = fabric.all_reduce(correct, reduce_op="sum")

    fabric.print(f"test accuracy {correct.item() / len(test):.3f}")
    if args.losses and fabric.is_global_zero:
        args.losses.write_text("".join(f"{loss.hex()}\n" for loss in losses))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--losses", type=Path, help="write the loss of every step there, as hexadecimal floats")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=1)
    main(parser.parse_args())
