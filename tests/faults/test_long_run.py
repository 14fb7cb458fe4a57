"""200,000 tiny steps with logging, validation and checkpoints: nothing grows after the first thousand.

As a program, this file is the run.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tests.processes import run_as_program
from tests.trainer.models import Net, Samples
from torch import Tensor
from torch.utils.data import DataLoader

import treadle as L
from treadle.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from treadle.loggers import CSVLogger, TensorBoardLogger

STEPS = 200_000
EPOCH = 4_000


class Long(Net):
    """Logs on steps and epochs, and steps a scheduler."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("own", loss, reduce_fx=torch.median, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 1e-9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1000), "interval": "step"}]


class Measuring(L.Callback):
    """What the process holds, every few thousand steps."""

    def __init__(self) -> None:
        self.found: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 1_000 or trainer.global_step % 10_000 == 0:
            gc.collect()
            process = psutil.Process()
            objects = len(gc.get_objects())
            memory = process.memory_info().rss
            self.found.append(
                {"step": trainer.global_step, "memory": memory, "files": process.num_fds(), "objects": objects,
                 "threads": process.num_threads()}
            )  # fmt: skip


def long_run(folder: Path) -> None:
    measuring = Measuring()
    run = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        val_check_interval=2_000,
        limit_val_batches=10,
        default_root_dir=folder,
        logger=[CSVLogger(folder, name="csv"), TensorBoardLogger(folder, name="board")],
        callbacks=[
            measuring,
            ModelCheckpoint(folder / "best", monitor="val_loss", save_top_k=2, save_last=True),
            ModelCheckpoint(folder / "steps", every_n_train_steps=1_000, save_top_k=1),
            EarlyStopping("val_loss", patience=10_000),
            LearningRateMonitor(),
        ],
    )
    run.fit(Long(), DataLoader(Samples(EPOCH), 1, shuffle=True), DataLoader(Samples(40), 2))
    (folder / "found.json").write_text(json.dumps(measuring.found))


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_200_000_steps(tmp_path: Path, record_property: Any) -> None:
    with open(tmp_path / "output.txt", "wb") as output:
        run_as_program(__file__, tmp_path, timeout=850, stdout=output, stderr=subprocess.STDOUT)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found[-1]["step"] == STEPS
    first, last = found[2], found[-1]  # both at the end of an epoch
    assert last["files"] == first["files"]
    assert last["threads"] == first["threads"]
    assert last["objects"] - first["objects"] < 500
    assert last["memory"] - first["memory"] < 4_000_000
    assert len(list((tmp_path / "best").iterdir())) == 3
    assert len(list((tmp_path / "steps").iterdir())) == 1
    assert (tmp_path / "output.txt").stat().st_size < 100_000
    rows = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().count("\n")
    assert rows < 2 * STEPS // 50 + 500
    record_property("long steps", STEPS)


if __name__ == "__main__":
    long_run(Path(sys.argv[1]))
