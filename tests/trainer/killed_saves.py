"""Runs that save at every step and are killed at a random moment, and what their checkpoints are like afterwards.

As a program it is a server: it reads one job a line and runs each in a fork of its own process, where everything is
imported already. A job ends only by being killed.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tests.processes import ROOT, wait_until
from torch import Tensor, nn

import treadle as L
from treadle.callbacks import ModelCheckpoint
from treadle_fabric import AsyncCheckpointIO, DistributedCheckpointIO, TorchCheckpointIO, newest_good


class Model(L.LightningModule):
    """Every weight equals the number of steps made, so that a file mixed from two saves is known."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(values // 8)) for _ in range(8))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("loss", -float(self.global_step))
        return -sum((w.sum() for w in self.weights), torch.zeros(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


WAYS = {"file": TorchCheckpointIO, "background": AsyncCheckpointIO, "folder": DistributedCheckpointIO}


def train(folder: str, save_last: bool | str, way: str, values: int) -> None:
    """Save at each step for as long as it takes."""
    warnings.simplefilter("ignore")
    saver = ModelCheckpoint(folder, "{step}", "loss", save_last=save_last, every_n_train_steps=1)  # type: ignore[arg-type]
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, logger=False, callbacks=saver, enable_progress_bar=False,
        enable_model_summary=False, plugins=WAYS[way](),
    )  # fmt: skip
    last = os.path.join(folder, "last.ckpt")
    resume = last if os.path.lexists(last) else None
    trainer.fit(Model(values), torch.utils.data.DataLoader(torch.zeros(1000, 1)), ckpt_path=resume)


def kill_at_random_moments(
    folder: Path, kills: int, seed: int, *, values: int = 200_000, ways: Sequence[str] = ("file", "background")
) -> int:
    """Kill runs, each going on from the one before, and check the checkpoints after each.

    Args:
        folder: For their checkpoints.
        kills: How many.
        seed: Of the moments.
        values: Weights of the model.
        ways: Of saving, keys of ``WAYS``.

    Returns:
        How many saves all runs made together.
    """
    draw = random.Random(seed)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    step: dict[str, int] = {}
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        try:
            for kill in range(kills):
                job: dict[str, Any] = {"save_last": (True, "link")[kill % 2], "way": ways[kill // 2 % len(ways)]}
                at = folder / "-".join(str(v) for v in job.values())
                server.stdin.write(json.dumps({"folder": str(at), "values": values, **job}) + "\n")
                server.stdin.flush()
                child = int(server.stdout.readline())
                before = _mark(at)
                wait_until(lambda: _mark(at) != before, timeout=30, every=0.001)  # noqa: B023  until it saves
                # A random moment of about the next two saves: that is what is tested
                time.sleep(draw.uniform(0, 0.2 if job["way"] == "folder" else 0.05))
                os.kill(child, signal.SIGKILL)
                status = int(server.stdout.readline())
                assert os.WIFSIGNALED(status), f"the run ended by itself, with status {status}"
                step[at.name] = _check(at, job, step.get(at.name, 0), kill // (2 * len(ways)) + 1)
        finally:
            server.stdin.close()
    return sum(step.values())


def _mark(folder: Path) -> int:
    try:
        return (folder / "last.ckpt").stat().st_mtime_ns
    except OSError:
        return 0


def _check(folder: Path, job: dict[str, Any], before: int, kills: int) -> int:
    """What "last" names loads, is of one moment, and is not older than after the kill before."""
    found = TorchCheckpointIO().load_checkpoint(folder / "last.ckpt")
    step: int = found["global_step"]
    assert step > before, (job, step, before)
    for name, weights in found["state_dict"].items():
        assert torch.equal(weights, torch.full_like(weights, float(step))), (job, step, name, weights[:3])
    assert (folder / "last.ckpt").is_symlink() == (job["save_last"] == "link")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing damaged lies about
        newest = newest_good(folder, holds=("optimizer_states",))
    assert newest is not None and TorchCheckpointIO().load_checkpoint(newest)["global_step"] >= step
    # Each kill may leave one file behind that the next run does not know of
    assert len(list(folder.glob("*.ckpt"))) <= 3 + kills, sorted(folder.iterdir())
    return step


def serve() -> None:
    """Run the jobs on stdin; write the process of each, and when it ended its status."""
    torch.set_num_threads(1)
    importlib.import_module("treadle_fabric.checkpoint.distributed.torch_index")  # what a fork would import first
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            job = json.loads(line)
            train(**job)
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    serve()
