"""Rung 1 of 3: a digit classifier and its training loop, by hand.

    python examples/ladder/1_raw.py --losses raw.txt

Compare with `diff examples/ladder/1_raw.py examples/ladder/2_fabric.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    pixels, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    train, test = random_split(digits, [1437, 360])
    order = torch.Generator().manual_seed(1)
    train_loader = DataLoader(train, args.batch_size, shuffle=True, generator=order, drop_last=True)
    test_loader = DataLoader(test, args.batch_size)

    model = Digits().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    losses = []
    for _ in range(args.epochs):
        for images, targets in train_loader:
            images, targets = images.to(device), targets.to(device)
            optimizer.zero_grad()
            loss = cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    model.eval()
    correct = 0
    with torch.no_grad():
        for images, targets in test_loader:
            images, targets = images.to(device), targets.to(device)
            correct += (model(images).argmax(1) == targets).sum().item()

    print(f"test accuracy {correct / len(test):.3f}")
    if args.losses:
        args.losses.write_text("".join(f"{loss.hex()}\n" for loss in losses))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--losses", type=Path, help="write the loss of every step there, as hexadecimal floats")
    main(parser.parse_args())
