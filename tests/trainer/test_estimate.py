"""Estimates of LightningModules, from Python and from the command line.

Tests of ``treadle_fabric.estimating.step``, ``treadle_fabric.cli.estimate``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import treadle as L
from treadle_fabric import MisconfigurationException, estimate
from treadle_fabric.cli import main


class Learner(L.LightningModule):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.net(batch).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Manual(Learner):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def batch() -> torch.Tensor:
    return torch.zeros(4, 8)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_stage_2"])
def test_a_lightning_module_brings_its_step_and_optimizers(strategy: str) -> None:
    found = estimate(Learner(), None, strategy, 4, "bf16-mixed", batch)
    assert found.parameters == 8 * 16 + 16 + 16 + 1
    assert found.memory.optimizer_state > 0 and found.traffic


def test_a_step_by_hand_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="automatic_optimization=False"):
        estimate(Manual(), None, "ddp", 4, batch=batch)


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = "tests.trainer.test_estimate"
    given = [
        "estimate",
        f"{here}:Learner",
        "--batch",
        f"{here}:batch",
        "--devices",
        "8",
        "--init-args",
        '{"width": 32}',
    ]
    assert main([*given, "--strategies", "ddp,deepspeed_stage_1,deepspeed_stage_3", "--json"]) == 0
    ddp, one, three = json.loads(capsys.readouterr().out)
    assert ddp["parameters"] == one["parameters"] == three["parameters"] == 8 * 32 + 32 + 32 + 1
    assert ddp["memory"]["optimizer_state"] > one["memory"]["optimizer_state"] > 0
