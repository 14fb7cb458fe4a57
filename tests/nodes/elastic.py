"""A program under torchrun's elastic agent: it resumes from its last checkpoint, and waits once for what may happen."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from tests.nodes.training import EPOCHS, Net

import treadle as L
from treadle.callbacks import ModelCheckpoint

WAITS_AT = 7
"""The step at which each process of the first start waits: in the second epoch, after some checkpoints."""
ALONE_WAITS_AT = 9
"""The step at which a process that is alone waits until its agent ends it, to start anew with two hosts."""


class Waiting(Net):
    """A model whose processes wait before a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        step = self.trainer.global_step
        if step == WAITS_AT:
            (self.folder / f"waits-{self.trainer.world_size}-{self.trainer.global_rank}").touch()
            while not (self.folder / "go").exists():
                time.sleep(0.05)
        if step == ALONE_WAITS_AT and self.trainer.world_size == 1 and (self.folder / "comes-back").exists():
            (self.folder / "waits-1-0").touch()
            while True:  # until the grace period after SIGTERM ends
                time.sleep(0.05)
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_rank == 0:
            with open(self.folder / "losses", "a") as file:
                file.write(f"{step} {self.losses[-1]!r} {self.trainer.world_size}\n")
        return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--num-nodes", default="2")
    given = parser.parse_args()
    world = int(os.environ["WORLD_SIZE"])
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=world if given.num_nodes == "auto" else int(given.num_nodes),
        strategy=given.strategy,
        max_epochs=EPOCHS,
        logger=False,
        callbacks=ModelCheckpoint(given.folder / "checkpoints", save_last=True, every_n_train_steps=2),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Waiting(given.folder), ckpt_path="last")
