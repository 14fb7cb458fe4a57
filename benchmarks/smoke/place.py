"""Where the checks run, how they are found, and what they train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from treadle_fabric import Fabric, seed_everything


class Place:
    """Where the checks run: the device, a folder that is empty for each check, and whether all is small."""

    def __init__(self, cpu: bool, folder: str) -> None:
        self.cpu = cpu
        self.accelerator = "cpu" if cpu else "cuda"
        self.device = torch.device("cpu" if cpu else "cuda:0")
        self.folder = Path(folder)

    def trainer(self, **given: Any) -> L.Trainer:
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        chosen = {"accelerator": self.accelerator, "devices": 1, "default_root_dir": self.folder}
        return L.Trainer(**{**dict.fromkeys(quiet, False), **chosen, **given})

    def fabric(self, **given: Any) -> Fabric:
        return Fabric(**{"accelerator": self.accelerator, "devices": 1, **given})

    def wait(self) -> None:
        if not self.cpu:
            torch.cuda.synchronize()


class Check(NamedTuple):
    """A check: what it does, whether in a process of its own, and why it needs a card, if it does."""

    function: Callable[[Place], str]
    apart: bool
    card: str


CHECKS: dict[str, Check] = {}


def check(name: str, *, apart: bool = False, card: str = "") -> Callable[[Callable[..., str]], Callable[..., str]]:
    def add(function: Callable[..., str]) -> Callable[..., str]:
        CHECKS[name] = Check(function, apart, card)
        return function

    return add


def network(width: int = 32, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 1))


def samples(count: int = 40) -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(count, 16, generator=draw)
    return TensorDataset(x, x.sum(1, keepdim=True))


def batches(count: int = 40, size: int = 4, **given: Any) -> DataLoader[Any]:
    return DataLoader(samples(count), batch_size=size, **given)


class Model(L.LightningModule):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = network(dropout=dropout)
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.losses.append(loss.detach())
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2, eps=1e-4)  # 1e-8 is 0 in half precision


def made(kind: Callable[..., Any], *given: Any) -> Any:
    seed_everything(7, verbose=False)
    return kind(*given)


def values(losses: list[Tensor]) -> list[float]:
    return [float(loss) for loss in losses]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


class Saves(L.Callback):
    """Saves once, after a step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
