"""How many library frames a user reads past in a traceback out of training_step."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tests.architecture.sources import PACKAGES
from torch.utils.data import DataLoader

import treadle

FRAMES = 8

BARE = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Model(treadle.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.frames: list[str] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.frames = []
        frame = sys._getframe().f_back
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.split(".")[0] in PACKAGES:
                self.frames.append(f"{module}.{frame.f_code.co_qualname}")
            frame = frame.f_back
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("arguments", [BARE, {"enable_progress_bar": False}], ids=["bare", "defaults"])
def test_frames_from_fit_to_training_step(arguments: dict[str, Any]) -> None:
    """Counts the packages' own frames, `fit` included, as 22 were counted in Lightning 2.6."""
    model = Model()
    trainer = treadle.Trainer(accelerator="cpu", devices=1, max_steps=2, **arguments)
    trainer.fit(model, DataLoader(torch.randn(4, 2), batch_size=2))
    assert model.frames[-1].endswith("Trainer.fit")
    assert len(model.frames) <= FRAMES, "\n".join(model.frames)
