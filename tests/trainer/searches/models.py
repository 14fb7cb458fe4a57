"""A module that has state of every kind which a search might leave changed, and the fits to compare."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from treadle_fabric.randomness import own_rng_states, same_rng_states


class Counted(TensorDataset):
    """Counts what is asked for, and adds noise from a generator of its own and from Python's."""

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(1)
        super().__init__(torch.randn(24, 4, generator=made), torch.randn(24, 1, generator=made))
        self.asked, self.noise = 0, torch.Generator().manual_seed(2)

    def __getitem__(self, index: Any) -> Any:
        self.asked += 1
        x, y = super().__getitem__(index)
        return x + 0.01 * torch.randn(4, generator=self.noise) + 0.01 * random.random(), y


class Stateful(L.LightningModule):
    """Dropout, batch norm, a frozen layer, state in plain Python, generators, a scheduler, and loaders of its own."""

    error: Callable[[int, int], BaseException | None] | None = None
    """Gets the batch size and the number of the call; what it returns is raised."""

    def __init__(self, lr: float = 0.05, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.batch_size = lr, batch_size
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3))
        self.head, self.frozen = nn.Linear(8, 1), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.body[1].train(False)
        self.calls, self.noise = 0, torch.Generator().manual_seed(3)
        self.losses: list[Tensor] = []
        self.nested = {"seen": deque(maxlen=5), "sizes": Counter()}
        self.register_buffer("mean", torch.zeros(4), persistent=False)
        self.data, self.shuffled = Counted(), torch.Generator().manual_seed(4)

    def setup(self, stage: str) -> None:
        if not hasattr(self, "late"):
            self.late = nn.Linear(8, 8)

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=self.batch_size, shuffle=True, generator=self.shuffled)

    predict_dataloader = test_dataloader = val_dataloader = train_dataloader

    def on_train_epoch_start(self) -> None:
        self.frozen.requires_grad_(self.current_epoch > 0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.error is not None and (error := self.error(len(x), self.calls)) is not None:
            raise error
        self.nested["seen"].append(len(x))
        self.nested["sizes"][len(x)] += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        x = x + 0.01 * torch.randn(x.shape, generator=self.noise) - self.mean
        return self.head(self.late(self.frozen(self.body(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self(batch[0]) - batch[1]).square().mean() * (1 + 0.01 * self.calls)
        self.losses.append(loss.detach())
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean())

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step) - 0.1 / total)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def trainer(**settings: Any) -> L.Trainer:
    """A trainer of two epochs on the CPU that writes nothing."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    written = {"logger": False, "enable_checkpointing": False}
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 2, **quiet, **written, **settings})


def held(module: L.LightningModule) -> dict[str, Any]:
    """All that the module holds, as plain values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.device, value.requires_grad, value.tolist(), plain(value.grad)
        if isinstance(value, torch.Generator):
            return value.get_state().tolist()
        if isinstance(value, (list, tuple, deque)):
            return [plain(each) for each in value]
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)

    parts = {name: plain(vars(part)) for name, part in module.named_modules()}
    return {**parts, "data": (module.data.asked, plain(module.data.noise))}  # type: ignore[attr-defined]


class Random:
    """The global random state at one moment."""

    def __init__(self) -> None:
        self._states = own_rng_states()

    def is_unchanged(self) -> bool:
        return same_rng_states(self._states, own_rng_states())


def files() -> set[str]:
    """All files in the working directory."""
    return {str(path) for path in Path().rglob("*")}
