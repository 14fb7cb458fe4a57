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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from tests.processes import ROOT, wait_until
from torch import Tensor, nn

import treadle as L
from treadle.callbacks import ModelCheckpoint
from treadle_fabric import (
    AsyncCheckpointIO,
    CheckpointIO,
    DistributedCheckpointIO,
    TorchCheckpointIO,
    find_free_port,
    newest_good,
)


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


WAYS: dict[str, Callable[[], CheckpointIO]] = {
    "file": TorchCheckpointIO,
    "background": AsyncCheckpointIO,
    "folder": DistributedCheckpointIO,
    "shared": lambda: AsyncCheckpointIO(DistributedCheckpointIO()),  # by two ranks
}


def ranks_of(way: str) -> int:
    """The number of processes that save."""
    return 2 if way == "shared" else 1


def train(folder: str, save_last: bool | str, way: str, values: int, rank: int, port: int) -> None:
    """Save at each step for as long as it takes."""
    warnings.simplefilter("ignore")
    devices = ranks_of(way)
    if devices > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
        os.environ |= {"WORLD_SIZE": str(devices), "LOCAL_RANK": str(rank)}
    saver = ModelCheckpoint(folder, "{step}", "loss", save_last=save_last, every_n_train_steps=1)  # type: ignore[arg-type]
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, max_epochs=-1, logger=False, callbacks=saver, enable_progress_bar=False,
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
                ranks = [int(pid) for pid in server.stdout.readline().split()]
                before = _mark(at)
                wait_until(lambda: _mark(at) != before, timeout=30, every=0.001)  # noqa: B023  until it saves
                # A random moment of about the next two saves: that is what is tested
                time.sleep(draw.uniform(0, 0.05 if ranks_of(job["way"]) == 1 and job["way"] != "folder" else 0.2))
                # All ranks as a rule; else the others end by themselves
                killed = ranks if draw.random() < 0.8 else [draw.choice(ranks)]
                for rank in killed:
                    os.kill(rank, signal.SIGKILL)
                statuses = [int(status) for status in server.stdout.readline().split()]
                ended = {rank: status for rank, status in zip(ranks, statuses, strict=True) if rank in killed}
                assert all(map(os.WIFSIGNALED, ended.values())), f"the run ended by itself, with status {ended}"
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
    for heavy in ("treadle_fabric.checkpoint.distributed.torch_index", "torch._dynamo"):
        importlib.import_module(heavy)  # what each fork would import
    for line in sys.stdin:
        job, port = json.loads(line), find_free_port()
        children = [os.fork() or _train(job, rank, port) for rank in range(ranks_of(job["way"]))]
        print(*children, flush=True)
        print(*(os.waitpid(child, 0)[1] for child in children), flush=True)


def _train(job: dict[str, Any], rank: int, port: int) -> NoReturn:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if ranks_of(job["way"]) > 1:
        os.dup2(1, 2)  # what a rank says of another one that is gone
    try:
        train(**job, rank=rank, port=port)
    finally:
        os._exit(1)


if __name__ == "__main__":
    serve()
