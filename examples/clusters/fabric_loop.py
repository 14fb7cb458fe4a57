"""A hand-written loop in a SLURM job: when the end is announced, all ranks save, and the job is queued again.

srun python examples/clusters/fabric_loop.py --devices 4 --nodes $SLURM_NNODES        # with the options of slurm.sh
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from treadle_fabric import StopAgreement
from treadle_fabric.environments import requeue

SAVED = "loop.ckpt"


def main(given: argparse.Namespace) -> None:
    fabric = L.Fabric(accelerator=given.accelerator, devices=given.devices, num_nodes=given.nodes)
    fabric.launch()
    cluster = fabric.strategy.cluster_environment
    announced: list[int] = []
    if cluster is not None and (number := cluster.announcing_signal()):  # SIGUSR1, see slurm.sh
        signal.signal(number, lambda number, frame: announced.append(number))

    fabric.seed_everything(0)
    model = torch.nn.Linear(8, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(512, 8)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 16, shuffle=True))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader, "step": 0}
    if os.path.exists(SAVED):
        fabric.load(SAVED, state)
        fabric.print(f"went on from step {state['step']}")

    agreement = StopAgreement()
    while state["step"] < given.steps:
        for inputs, targets in loader:  # after a restart: the rest of the epoch
            optimizer.zero_grad()
            fabric.backward(torch.nn.functional.mse_loss(model(inputs), targets))
            optimizer.step()
            state["step"] += 1
            # The signal may come to one rank only, or to each at another step: all ranks leave after the same one.
            if agreement.at_boundary(state["step"], "announced" if announced else ""):
                end(fabric, state)
            if state["step"] == given.steps:
                break
    agreement.close()
    fabric.print(f"trained to step {state['step']}")


def end(fabric: L.Fabric, state: dict[str, Any]) -> None:
    """Save, and queue the job again; SLURM kills all ranks then, so that rank 0 asks when all are done."""
    fabric.save(SAVED, state)
    fabric.barrier()
    cluster = fabric.strategy.cluster_environment
    if fabric.is_global_zero and cluster is not None and (job := cluster.job_to_requeue()):
        requeue(job)
    fabric.barrier()
    sys.exit(143)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args())
