"""Runs of two ranks, one of which is asked to stop. As a program: ``preempted.py MODE STRATEGY``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from treadle.callbacks import ModelCheckpoint


class Model(L.LightningModule):
    """Does what ``mode`` says in the step after ``global_step`` 5; half of its batches go to each rank."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.layer = torch.nn.Linear(4, 2)
        if mode == "stuck":
            self.layer.bias.register_hook(lambda grad: Path("waiting").touch() if self.global_step == 5 else None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 5:
            self.act()
        return self.layer(batch[0]).square().mean()

    def act(self) -> None:
        if self.mode == "everybody" or (self.mode == "stop" and self.global_rank == 1):
            self.trainer.should_stop = True
        if self.mode == "killed" or (self.mode == "term" and self.global_rank == 1):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.mode == "term of the parent" and self.global_rank == 1:
            os.kill(os.getppid(), signal.SIGTERM)
        if self.mode == "announce" and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.mode == "stuck" and self.global_rank == 1:
            Path("stuck").touch()
            threading.Event().wait(60)  # the other waits for the gradients

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.mode == "term in validation":
            if self.global_rank == 1 and batch_idx == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)  # 300 of them are long beside the 0.2 s after which the other rank hears of it
        self.log("val", self.layer(batch[0]).square().mean())
        if batch_idx % 10 == 0:
            say(f"validated {self.global_rank} {batch_idx}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.mode == "killed" and self.global_step == 6:
            checkpoint["large"] = torch.zeros(50_000_000)
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Ending(L.Callback):
    def __init__(self, mode: str) -> None:
        self.mode = mode

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.ckpt_path is not None:
            say(f"from {trainer.global_rank} {Path(trainer.ckpt_path).name}")

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        say(f"ended {trainer.global_rank} {trainer.global_step}")

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self.mode in ("term", "announce") and trainer.global_rank == 1:
            time.sleep(3)  # longer than the 2 s that a rank that is stuck would be left to live
        say(f"exception {trainer.global_rank} {trainer.global_step} {type(exception).__name__}")


def say(line: str) -> None:
    """Add a line to the file of all ranks; the line is whole, whoever else writes."""
    with open("said", "ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def fit(mode: str, strategy: str, ckpt_path: str | None = None) -> None:
    """Train in this folder, three epochs of ten steps a rank."""
    torch.manual_seed(0)
    trainer = L.Trainer(
        accelerator="cpu", devices=1 if mode == "killed" else 2, strategy=strategy, max_epochs=3, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[Ending(mode), ModelCheckpoint(every_n_train_steps=5, save_last=True)],
    )  # fmt: skip
    data = TensorDataset(torch.randn(80, 4))
    val = DataLoader(TensorDataset(torch.randn(1200, 4)), 2) if "validation" in mode else None
    trainer.fit(Model(mode), DataLoader(data, 4), val, ckpt_path=ckpt_path)


def handle(number: int, frame: object) -> None:
    """A user's handler; ``ANSWER`` says how it ends: with nothing, an exit status, or an error."""
    saved = (Path("checkpoints") / "preempted.ckpt").exists()
    say(f"handled {os.environ.get('LOCAL_RANK', 'parent')} {signal.Signals(number).name} {'saved' if saved else ''}")
    answer = os.environ["ANSWER"]
    if answer.isdecimal():
        sys.exit(int(answer))
    if answer == "error":
        raise ValueError("the handler failed")


if __name__ == "__main__":
    if "ANSWER" in os.environ:
        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGUSR1, handle)
    fit(*sys.argv[1:])
