"""Two ranks, and one of them is asked to stop: both stop after the same batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor

import treadle as L

SCRIPT = r"""
import os, signal, sys, time
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

    def validation_step(self, batch, batch_idx):
        if mode == "validation":
            if self.global_rank == 1 and batch_idx == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)
        self.log("val", self.layer(batch[0]).square().mean())
        if batch_idx % 10 == 0:
            os.write(1, f"validated {self.global_rank} {batch_idx}\n".encode())

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
    callbacks=Ending(), num_sanity_val_steps=0,
)
data = TensorDataset(torch.randn(80, 4))
val = DataLoader(TensorDataset(torch.randn(1200, 4)), 2) if mode.startswith("validation") else None
trainer.fit(Model(), DataLoader(data, 4), val, ckpt_path=ckpt_path)
"""


def launch(*arguments: str) -> tuple[int, list[str], str, list[str]]:
    """Exit status, how each rank ended, what was said, and which batches were validated."""
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
    validated = [line for line in done.stdout.splitlines() if line.startswith("validated")]
    return done.returncode, lines, done.stderr, validated


@pytest.mark.parametrize("mode", ["stop", "everybody"])
def test_a_stop_on_one_rank_stops_all_after_the_same_batch(mode: str) -> None:
    status, lines, _, _ = launch(mode)
    assert status == 0
    steps = {line.split()[2] for line in lines}
    assert [line.split()[:2] for line in lines] == [["ended", "0"], ["ended", "1"]]
    assert len(steps) == 1
    assert steps == {"6"} if mode == "everybody" else int(steps.pop()) in (6, 7)


def test_sigterm_to_one_rank_saves_and_ends_all_with_143_and_the_run_goes_on_from_there() -> None:
    status, lines, stderr, _ = launch("term")
    assert status == 143, stderr
    assert {line.split()[3] for line in lines} == {"SIGTERMException"}
    steps = {int(line.split()[2]) for line in lines}
    assert len(lines) == 2
    assert len(steps) == 1
    assert "Traceback" not in stderr
    saved = torch.load(Path("checkpoints") / "preempted.ckpt", weights_only=True)
    assert saved["global_step"] == steps.pop()
    status, lines, stderr, _ = launch("none", "last")
    assert status == 0, stderr
    assert "preempted.ckpt" in stderr
    assert lines == ["ended 0 30", "ended 1 30"]


def test_sigterm_in_a_long_validation_ends_it_on_all_ranks_and_it_begins_anew() -> None:
    status, lines, stderr, validated = launch("validation")
    assert status == 143, stderr
    assert [line.split()[:3] for line in lines] == [["exception", "0", "10"], ["exception", "1", "10"]]
    batches = [int(line.split()[2]) for line in validated]  # of the 300 that each rank has
    assert max(batches) < 100
    status, lines, stderr, validated = launch("validation goes on", "last")
    assert status == 0, stderr
    assert lines == ["ended 0 30", "ended 1 30"]
    assert len(validated) == 2 * 3 * 30  # the interrupted one, and those of the two other epochs


def test_sigterm_in_validation_in_one_process(tmp_path: Path) -> None:
    class Model(Net):
        def __init__(self, kill: bool) -> None:
            super().__init__()
            self.kill, self.validated = kill, 0

        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.validated += 1
            if self.kill and self.current_epoch == 1 and batch_idx == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            self.log("val", self.loss(batch) + torch.rand(()))

    def fit(kill: bool, folder: str, ckpt_path: str | None = None) -> tuple[L.Trainer, Model]:
        L.seed_everything(1, verbose=False)
        model, run = Model(kill), trainer(tmp_path / folder, max_epochs=3, enable_checkpointing=True)
        run.fit(model, loader(8, shuffle=True), loader(40), ckpt_path=ckpt_path)
        return run, model

    whole, expected = fit(False, "whole")
    with pytest.raises(SystemExit) as ended:
        fit(True, "killed")
    assert ended.value.code == 143
    run, model = fit(False, "killed", "last")
    assert model.validated == 2 + 20 + 20
    assert run.callback_metrics == whole.callback_metrics
    assert torch.equal(model.layer.weight, expected.layer.weight)
