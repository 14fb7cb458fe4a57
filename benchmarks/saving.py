"""What a save costs: for how long training stops, beside what plain PyTorch takes for the same state.

In each round every contestant has its turn, in changing order; a ratio is of two times of the same round. A file is
written under a new name each time and removed outside the clock, so that nobody pays for the removal of another's.

    python benchmarks/saving.py [--megabytes 1000] [--rounds 9] [--folder .]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from treadle_fabric import AsyncCheckpointIO, DistributedCheckpointIO, TorchCheckpointIO

SYNCHRONOUS = 1.15
ASYNCHRONOUS = 1.3
TENSORS = 100


def plain(state: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def copy(state: dict[str, torch.Tensor], path: Path) -> None:
    kept = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
    assert len(kept) == len(state)


def main() -> int:
    """Measure, print a table, and return 1 if a bar is not met."""
    parser = argparse.ArgumentParser(description="What a save costs.")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", default=".")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    values = given.megabytes * 10**6 // 4 // TENSORS
    state = {f"layer{i}.weight": torch.randn(values, device=given.device) for i in range(TENSORS)}
    now, later, sharded = TorchCheckpointIO(), AsyncCheckpointIO(), DistributedCheckpointIO()
    contestants: dict[str, Callable[[dict[str, torch.Tensor], Path], None]] = {
        "torch.save + fsync": plain,
        "TorchCheckpointIO": now.save_checkpoint,
        "one copy": copy,
        "AsyncCheckpointIO": later.save_checkpoint,
        "DistributedCheckpointIO": sharded.save_checkpoint,
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for turn in range(-2, given.rounds):  # two rounds to warm up
            order = list(contestants)[turn % 5 :] + list(contestants)[: turn % 5]
            for name in order:
                path = Path(folder, f"{order.index(name)}.ckpt")
                start = time.perf_counter()
                contestants[name](state, path)
                seconds = time.perf_counter() - start
                later.wait()
                now.remove_checkpoint(path)
                if turn >= 0:
                    times[name].append(seconds)
        later.teardown()
    print(f"{given.megabytes} MB in {TENSORS} tensors on {state['layer0.weight'].device}, {given.rounds} rounds")
    print(f"{'':<24} {'best':>8} {'median':>8}")
    for name, taken in times.items():
        print(f"{name:<24} {min(taken):7.3f}s {statistics.median(taken):7.3f}s")
    good = True
    for name, base, bar in (
        ("TorchCheckpointIO", "torch.save + fsync", SYNCHRONOUS),
        ("AsyncCheckpointIO", "one copy", ASYNCHRONOUS),
        ("DistributedCheckpointIO", "torch.save + fsync", SYNCHRONOUS),
    ):
        ratio = statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
        best = min(times[name]) / min(times[base])
        good &= min(ratio, best) <= bar
        print(f"{name} / {base}: {ratio:.2f} (median of the rounds), {best:.2f} (best by best); at most {bar}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
