"""Two ranks, and one of them is asked to stop: both stop after the same batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = r"""
import os, signal, sys
import torch
import treadle as L
from torch.utils.data import DataLoader, TensorDataset

mode, ckpt_path = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None

class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and self.global_step == 5 and mode == "stop":
            self.trainer.should_stop = True
        if self.global_rank == 1 and self.global_step == 5 and mode == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if mode == "everybody" and self.global_step == 5:
            self.trainer.should_stop = True
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Ending(L.Callback):
    def on_train_end(self, trainer, pl_module):
        os.write(1, f"ended {trainer.global_rank} {trainer.global_step}\n".encode())  # whole, whoever else writes

    def on_exception(self, trainer, pl_module, exception):
        os.write(1, f"exception {trainer.global_rank} {trainer.global_step} {type(exception).__name__}\n".encode())

torch.manual_seed(0)
trainer = L.Trainer(
    accelerator="cpu", devices=2, max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=Ending(),
)
trainer.fit(Model(), DataLoader(TensorDataset(torch.randn(80, 4)), 4), ckpt_path=ckpt_path)
"""


def launch(*arguments: str) -> tuple[int, list[str], str]:
    path = Path("victim.py")
    path.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = sorted(line for line in done.stdout.splitlines() if line.split()[0] in ("ended", "exception"))
    return done.returncode, lines, done.stderr


@pytest.mark.parametrize("mode", ["stop", "everybody"])
def test_a_stop_on_one_rank_stops_all_after_the_same_batch(mode: str) -> None:
    status, lines, _ = launch(mode)
    assert status == 0
    steps = {line.split()[2] for line in lines}
    assert [line.split()[:2] for line in lines] == [["ended", "0"], ["ended", "1"]]
    assert len(steps) == 1
    assert steps == {"6"} if mode == "everybody" else int(steps.pop()) in (6, 7)


def test_sigterm_to_one_rank_saves_and_ends_all_with_143_and_the_run_goes_on_from_there() -> None:
    status, lines, stderr = launch("term")
    assert status == 143, stderr
    assert {line.split()[3] for line in lines} == {"SIGTERMException"}
    steps = {int(line.split()[2]) for line in lines}
    assert len(lines) == 2
    assert len(steps) == 1
    assert "Traceback" not in stderr
    saved = torch.load(Path("checkpoints") / "preempted.ckpt", weights_only=True)
    assert saved["global_step"] == steps.pop()
    status, lines, stderr = launch("none", "last")
    assert status == 0, stderr
    assert "preempted.ckpt" in stderr
    assert lines == ["ended 0 30", "ended 1 30"]
