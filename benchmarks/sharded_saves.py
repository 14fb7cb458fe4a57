"""What a save of a sharded model costs each rank, where every rank has a part of the same size: nothing should grow.

A model of ``--megabytes`` of parameters a process is shared out by FSDP and trained for a step with AdamW, so that each
process keeps three times as much; then it is saved into a folder, to which each process writes its part. Printed are
the seconds of a save, and for each rank its seconds of processor time, the growth of its memory in the save, and the
bytes that it wrote. Processor time tells more than seconds on a machine with fewer cores than processes.

    python benchmarks/sharded_saves.py [--megabytes 120] [--rounds 5] [--processes 1 2 4] [--folder .]
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
from rank_state import memory
from torch import nn

from treadle_fabric import Fabric
from treadle_fabric.strategies import FSDPStrategy

LAYERS = 8
GROWS = 1.5
"""Processor time and bytes of a rank, at most this many times those of one process alone."""
MORE_MEMORY = 10e6
"""Bytes by which the memory of a rank may grow in a save more than that of one process alone, at most."""


def written() -> int:
    """Bytes that this process has given to the system to write."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))


def train_and_save(given: argparse.Namespace) -> None:
    """One process; all of them come here."""
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=given.one, strategy=FSDPStrategy(policy={nn.Linear}))
    fabric.launch()
    width = int((given.megabytes * 1e6 * given.one / 4 / LAYERS) ** 0.5) // 8 * 8
    with fabric.init_module(empty_init=True):
        net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters()))
    fabric.backward(model(torch.ones(1, width)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
    state = {"model": model, "optimizer": optimizer}
    path = Path(given.folder, "saved.ckpt")
    found: dict[str, list[float]] = {"seconds": [], "busy": [], "grown": [], "bytes": []}
    for _ in range(given.rounds + 1):
        fabric.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
        before, wrote, start, worked = memory("VmRSS"), written(), time.perf_counter(), time.process_time()
        fabric.save(path, state)
        found["busy"].append(time.process_time() - worked)
        found["bytes"].append(written() - wrote)
        found["grown"].append(memory("VmHWM") - before)
        fabric.barrier()
        found["seconds"].append(time.perf_counter() - start)
    told: dict[str, Any] = {name: statistics.median(values[1:]) for name, values in found.items()}  # the first imports
    Path(given.folder, f"rank_{fabric.global_rank}.json").write_text(json.dumps(told))


def measure(given: argparse.Namespace, processes: int) -> list[dict[str, float]]:
    """What each rank noted."""
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        numbers = [f"--{name}={getattr(given, name)}" for name in ("megabytes", "rounds")]
        command = [sys.executable, __file__, *numbers, f"--folder={folder}", f"--one={processes}"]
        environment = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")}
        subprocess.run(command, check=True, env=environment)
        return [json.loads(Path(folder, f"rank_{rank}.json").read_text()) for rank in range(processes)]


def main() -> int:
    """Measure, print a table, and return 1 if a bar is not met."""
    parser = argparse.ArgumentParser(description="What a save of a sharded model costs each rank.")
    parser.add_argument("--megabytes", type=int, default=120, help="of parameters, a process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", default=".")
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        train_and_save(given)
        return 0
    print(f"{os.cpu_count()} cores, {given.megabytes} MB of parameters a process")
    print(f"{'ranks':>5}{'s':>7}  {'CPU s, by rank':<24}{'MB more, by rank':<24}MB written, by rank")
    alone = measure(given, 1)[0]
    missed = False
    for processes in given.processes:
        found = measure(given, processes) if processes > 1 else [alone]
        for rank in found:
            missed |= rank["bytes"] > GROWS * alone["bytes"] or rank["busy"] > GROWS * alone["busy"]
            missed |= rank["grown"] > alone["grown"] + MORE_MEMORY
        columns = [" ".join(f"{rank['busy']:.2f}" for rank in found)]
        columns += [" ".join(f"{rank[name] / 1e6:.0f}" for rank in found) for name in ("grown", "bytes")]
        seconds = max(rank["seconds"] for rank in found)
        print(f"{processes:>5}{seconds:>7.2f}  {columns[0]:<24}{columns[1]:<24}{columns[2]}", flush=True)
    print(f"bars: {GROWS} times the bytes and CPU time of one process, {MORE_MEMORY / 1e6:.0f} MB more memory")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
