"""What each rank's own state costs in a save: time, and memory of every rank.

A model of ``--megabytes`` of weights is trained with gradient accumulation and saved between two optimizer steps, so
that each rank has the same number of megabytes of gradients of its own to save. In a file rank 0 writes them all; in a
folder each rank writes its own. Beside it one process saves the same number of bytes in all: on a machine with fewer
cores than processes this is the fair comparison for the time, and both ratios are printed. The seconds of processor
time, of all ranks together, say the same where other programs are running.

    python benchmarks/rank_state.py [--megabytes 100] [--rounds 5] [--processes 1 2 4] [--folder .]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import treadle as L
from treadle_fabric import DistributedCheckpointIO, TorchCheckpointIO

SLOWER = 1.3
"""Seconds a byte, at most this many times those of one process."""
MORE_MEMORY = 10e6
"""Bytes by which the memory of a rank that writes no other rank's state may grow in a save, at most."""
LAYERS = 25


class Model(L.LightningModule):
    """Linear layers, and what else one process saves to have the same number of bytes as several."""

    def __init__(self, megabytes: int, extra: int) -> None:
        super().__init__()
        width = int((megabytes * 1e6 / 4 / LAYERS) ** 0.5)
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(LAYERS)])
        self.extra = [torch.randn(width, width) for _ in range(extra // (4 * width * width))]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        width = self.layers[0].in_features
        return sum(((layer(batch.expand(4, width)) ** 2).mean() for layer in self.layers), torch.zeros(()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["extra"] = self.extra

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def memory(name: str) -> int:
    """Bytes, as the system has them under this name: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Saver(L.Callback):
    """Saves between two optimizer steps, and notes for each rank how long that took and what memory it needed."""

    def __init__(self, folder: str, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != 1:
            return
        path = Path(self.folder, "saved.ckpt")
        seconds, busy, grown = [], [], []
        for _ in range(self.rounds + 1):
            trainer.strategy.barrier()
            Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
            before, start, worked = memory("VmRSS"), time.perf_counter(), time.process_time()
            trainer.save_checkpoint(path)
            busy.append(time.process_time() - worked)
            trainer.strategy.barrier()
            seconds.append(time.perf_counter() - start)
            grown.append(memory("VmHWM") - before)
            if trainer.is_global_zero:
                size = sum(f.stat().st_size for f in path.iterdir()) if path.is_dir() else path.stat().st_size
                trainer.strategy.checkpoint_io.remove_checkpoint(path)
        # the first save imports torch.distributed.checkpoint, too
        found = {
            "seconds": statistics.median(seconds[1:]),
            "busy": statistics.median(busy[1:]),
            "grown": max(grown[1:]),
        }
        if trainer.is_global_zero:
            found["size"] = size
        Path(self.folder, f"rank_{trainer.global_rank}.json").write_text(json.dumps(found))


def train(given: argparse.Namespace) -> None:
    """One run; every process comes here."""
    torch.set_num_threads(1)
    L.Trainer(
        accelerator="cpu", devices=given.one, strategy="ddp" if given.one > 1 else "auto", logger=False, max_steps=1,
        accumulate_grad_batches=4, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        plugins=DistributedCheckpointIO() if given.kind == "folder" else TorchCheckpointIO(),
        callbacks=Saver(given.folder, given.rounds), use_distributed_sampler=False, default_root_dir=given.folder,
    ).fit(Model(given.megabytes, given.extra), DataLoader(torch.randn(8, 1), batch_size=1))  # fmt: skip


def measure(given: argparse.Namespace, kind: str, processes: int, extra: int = 0) -> list[dict[str, Any]]:
    """What each rank noted."""
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        numbers = [f"--{name}={getattr(given, name)}" for name in ("megabytes", "rounds")]
        command = [sys.executable, __file__, *numbers, f"--folder={folder}", f"--one={processes}", f"--kind={kind}"]
        environment = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")}
        subprocess.run([*command, f"--extra={extra}"], check=True, env=environment)
        return [json.loads(Path(folder, f"rank_{rank}.json").read_text()) for rank in range(processes)]


def main() -> int:
    """Measure, print a table, and return 1 if a bar is not met."""
    parser = argparse.ArgumentParser(description="What each rank's own state costs in a save.")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", default=".")
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="", help=argparse.SUPPRESS)
    parser.add_argument("--extra", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        train(given)
        return 0
    print(f"{os.cpu_count()} cores, {given.megabytes} MB of gradients a rank")
    print(f"{'':<8}{'ranks':>6}{'MB':>6}{'s':>7}{'s/GB':>7}{'to 1':>6}{'to 1, same MB':>15}", end="")
    print(f"{'CPU s/GB':>10}{'to 1, same MB':>15}  MB more, by rank")
    missed = 0
    for kind in ("file", "folder"):
        alone = measure(given, kind, 1)[0]
        for processes in given.processes:
            found = measure(given, kind, processes) if processes > 1 else [alone]
            size, seconds = found[0]["size"], max(rank["seconds"] for rank in found)
            same = measure(given, kind, 1, size - alone["size"])[0] if processes > 1 else alone
            ratio = seconds / size / (alone["seconds"] / alone["size"])
            fair = seconds / size / (same["seconds"] / same["size"])
            work, work_alone = sum(rank["busy"] for rank in found) / size, same["busy"] / same["size"]
            more = [rank["grown"] / 1e6 for rank in found]
            missed += fair > SLOWER or any(each > MORE_MEMORY / 1e6 for each in more[1:])
            print(
                f"{kind:<8}{processes:>6}{size / 1e6:>6.0f}{seconds:>7.2f}{seconds / size * 1e9:>7.2f}{ratio:>6.2f}"
                f"{fair:>15.2f}{work * 1e9:>10.2f}{work / work_alone:>15.2f}  {' '.join(f'{m:.0f}' for m in more)}",
                flush=True,
            )
    print(f"bars: {SLOWER} times the seconds a byte of one process, {MORE_MEMORY / 1e6:.0f} MB more on ranks from 1")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
