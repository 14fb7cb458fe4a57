"""Two real processes whose metrics and clocks disagree: rank 0's count, so that both decide alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, os, sys, time
from datetime import timedelta
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import treadle as tr
from treadle.callbacks import EarlyStopping, ModelCheckpoint, Timer
from treadle_fabric import on_rank_zero

MINE = int(os.environ.get("LOCAL_RANK", "0"))
SCRIPTS = {"a": [[3.0, 2.0, 1.0, 4.0], [1.0, 2.0, 3.0, 4.0]], "only_zero": [[3.0, 3.5, 4.0, 4.5], None]}


class Model(tr.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(0.005)
        for name, scripts in SCRIPTS.items():
            script = scripts[self.global_rank]
            if script is not None:  # each rank logs its own, and one of them nothing
                self.log(name, script[min(self.current_epoch, 3)], on_step=True, on_epoch=False)
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(*callbacks, **arguments):
    trainer = tr.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **arguments,
    )
    trainer.fit(Model(), DataLoader(TensorDataset(torch.randn(16, 2)), batch_size=2))
    return trainer


class Acts(tr.Callback):
    def on_train_start(self, trainer, pl_module):
        def fail():
            raise ValueError("out of order")

        self.learned = [on_rank_zero(trainer.strategy, lambda: MINE + 5, "could not add")]
        try:
            on_rank_zero(trainer.strategy, fail, "could not act")
        except Exception as error:
            self.learned.append(f"{type(error).__name__}: {error}")


out = {}
root = Path(sys.argv[1])
acts = Acts()
# another folder on each rank: rank 0's is the one
checkpoint = ModelCheckpoint(root / f"rank{MINE}", "{epoch}-{a}", "a", save_top_k=2, save_last="link")
one = ModelCheckpoint(checkpoint.dirpath, "only", "only_zero", mode="max")
stopping = EarlyStopping("a", patience=1)
trainer = fit(checkpoint, one, stopping, acts, max_epochs=6)
out["epochs"] = trainer.current_epoch
out["dirpath"] = os.path.basename(checkpoint.dirpath)
out["best"] = {os.path.basename(p): float(v) for p, v in checkpoint.best_k_models.items()}
out["only"] = float(one.best_model_score)
out["stopping"] = [stopping.wait_count, stopping.stopped_epoch, float(stopping.best_score)]

timer = Timer(timedelta(seconds=0.2 if MINE == 0 else 3600), verbose=False)
by_time = ModelCheckpoint(
    root / "time", "{step}", save_top_k=-1, train_time_interval=timedelta(seconds=0.05 if MINE == 0 else 3600)
)
trainer = fit(timer, by_time, max_epochs=1000, enable_checkpointing=True)
out["steps"] = trainer.global_step
out["last_timed"] = by_time.best_model_path
(root / f"out{MINE}.json").write_text(json.dumps([out, acts.learned]))
"""


@pytest.mark.timeout(110)
def test_both_ranks_decide_alike(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks: list[Any] = [json.loads((tmp_path / f"out{rank}.json").read_text()) for rank in (0, 1)]
    (found, zero), (other, one) = ranks
    assert found == other
    assert zero == [5, "ValueError: out of order"]
    assert one == [5, "TreadleError: Rank 0 could not act: out of order"]
    assert found["epochs"] == 4
    assert found["stopping"] == [1, 3, 1.0]
    assert found["dirpath"] == "rank0"
    assert found["best"] == {"epoch=2-a=1.0.ckpt": 1.0, "epoch=1-a=2.0.ckpt": 2.0}
    assert found["only"] == 4.5
    folder = tmp_path / "rank0"
    assert not (tmp_path / "rank1").exists()
    assert sorted(p.name for p in folder.glob("*.ckpt")) == [
        "epoch=1-a=2.0.ckpt",
        "epoch=2-a=1.0.ckpt",
        "last.ckpt",
        "only.ckpt",
    ]
    assert 4 <= found["steps"] < 200
    assert Path(found["last_timed"]).exists()
    assert 2 <= len(list((tmp_path / "time").iterdir())) <= 6
