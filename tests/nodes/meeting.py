"""A program that only meets the other host's, and sums the ranks."""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path

import torch

from treadle_fabric import Fabric
from treadle_fabric.strategies import DDPStrategy

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--num-nodes", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=60)
    given = parser.parse_args()
    strategy = DDPStrategy(timeout=timedelta(seconds=given.timeout))
    fabric = Fabric(accelerator="cpu", devices=given.devices, num_nodes=given.num_nodes, strategy=strategy)
    fabric.launch()
    print("sum", int(fabric.all_reduce(torch.tensor(fabric.global_rank), reduce_op="sum")))
