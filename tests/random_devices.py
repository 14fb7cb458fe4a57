"""CUDA devices of which only the random generators are there, and a module that draws from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import treadle as L


class Devices:
    """Four CUDA devices, for which generators of the CPU stand; it notes those that are asked for a context."""

    now: Devices
    """Those that were made last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, current: int = 0) -> None:
        Devices.now = self
        self.generators = [torch.Generator().manual_seed(1) for _ in range(4)]
        self.current, self.initialized = current, True
        self.contexts = {current}
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "is_initialized", lambda: self.initialized)
        monkeypatch.setattr(cuda, "device_count", lambda: 4)
        monkeypatch.setattr(cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(cuda, "get_rng_state", lambda device="cuda": self.of(device).get_state())
        monkeypatch.setattr(cuda, "get_rng_state_all", lambda: [g.get_state() for g in self.generators])
        monkeypatch.setattr(cuda, "set_rng_state", lambda state, device="cuda": self.of(device).set_state(state))
        monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: index in self.contexts, raising=False)

    def of(self, device: int | str) -> torch.Generator:
        return self.generators[self.current if device == "cuda" else int(device)]

    def draw(self) -> list[float]:
        """A number from each device."""
        return [float(torch.rand((), generator=generator)) for generator in self.generators]

    def draw_own(self) -> float:
        return float(torch.rand((), generator=self.generators[self.current]))


class Draws(L.LightningModule):
    """Draws from the device of its rank; the loss of the batch with index ``fails`` is not finite."""

    def __init__(self, fails: int = -1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.fails = fails
        self.layer = torch.nn.Linear(4, 1)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = (self.layer(batch) * Devices.now.draw_own()).square().mean()
        loss = loss / (batch_idx != self.fails)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)
