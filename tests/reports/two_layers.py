"""A module of two layers, one of them frozen, for tests of what changes during a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import treadle as L


class Two(L.LightningModule):
    """A frozen layer under a trainable one."""

    def __init__(self, frozen: str = "below") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.above = nn.Linear(4, 4), nn.Linear(4, 2)
        if frozen:
            self.get_submodule(frozen).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.below(x / 10).relu())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def weights(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()]).tolist()
