"""A program that trains without an end until one of its ranks fails, or its host does."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from treadle_fabric import Fabric


def fail(how: str) -> None:
    """Fail in one of several ways."""
    if how == "raise":
        raise ValueError("the loom is broken")
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "interrupt":
        signal.raise_signal(signal.SIGINT)
    if how == "end":
        sys.exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("how")
    parser.add_argument("--rank", type=int, default=-1, help="the rank that fails; default: none")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default="ddp")
    given = parser.parse_args()
    fabric = Fabric(accelerator="cpu", devices=given.devices, num_nodes=2, strategy=given.strategy)
    fabric.launch()
    model = nn.Linear(4, 2)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.01))
    step: Any
    for step in range(10**9):
        loss = model(torch.ones(2, 4)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            (given.folder / f"trains{fabric.global_rank}").touch()
            if fabric.global_rank == given.rank:
                fail(given.how)
