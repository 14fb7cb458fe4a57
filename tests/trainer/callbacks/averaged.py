"""What the tests of averaged weights share: a module that notes what it is evaluated with, and comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tests.trainer.callbacks.scripted import trainer_with
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from treadle import Callback, LightningModule, Trainer


def batches(n: int = 4, seed: int = 1) -> DataLoader[Any]:
    """``n`` shuffled batches of two samples, the same in every process."""
    samples = torch.randn(2 * n, 3, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(samples), batch_size=2, shuffle=True)


class Noted(LightningModule):
    """A net with batch norm and dropout; it notes its weights after each step, and in each validation."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Identity(), nn.Dropout(0.2))
        self.head = nn.Linear(4, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []
        self.epoch_ends: list[Tensor] = []

    @property
    def weight(self) -> Tensor:
        return self.head.weight.detach().clone()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.head(self.body(batch[0])).square().mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append(self.weight)

    def on_train_epoch_end(self) -> None:
        self.epoch_ends.append(self.weight)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.weight)
        self.log("val_loss", self.head(self.body(batch[0])).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def fit(
    model: LightningModule, *callbacks: Callback, ckpt_path: str | None = None, n: int = 4, **arguments: Any
) -> Trainer:
    torch.manual_seed(3)
    trainer = trainer_with(*callbacks, **{"num_sanity_val_steps": 0, "accumulate_grad_batches": 1, **arguments})
    trainer.fit(model, batches(n), batches(1), ckpt_path=ckpt_path)
    return trainer


def differing(one: Any, other: Any, path: str = "") -> list[str]:
    """The paths at which two checkpoints are not equal to the last bit."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = {*one, *other} - ({"samples"} if path.endswith("/results") else set())  # of the last batch only
        return [p for k in sorted(keys, key=str) for p in differing(one.get(k), other.get(k), f"{path}/{k}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [p for i, (a, b) in enumerate(zip(one, other)) for p in differing(a, b, f"{path}/{i}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    return [] if type(one) is type(other) and one == other else [path]


class SavesAt(Callback):
    """Saves a checkpoint in a hook, at a global step."""

    def __init__(self, hook: str, step: int, path: str) -> None:
        def save(trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(path)

        setattr(self, hook, save)
