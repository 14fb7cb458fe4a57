"""A stand-in for SLURM: the variables of srun's tasks, and an ``scontrol`` that notes what it is asked."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["install_scontrol", "task"]


def task(rank: int = 0, tasks: int = 1, *, job: str = "4711", port: int = 0, **more: str) -> dict[str, str]:
    """What srun sets for one task of a job on one node."""
    found = {"SLURM_JOB_ID": job, "SLURM_JOB_NAME": "train", "SLURM_NTASKS": str(tasks), "SLURM_NNODES": "1"}
    found |= {"SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks)}
    found |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1"}
    return found | ({"MASTER_PORT": str(port)} if port else {}) | more


def install_scontrol(folder: Path, then: str = "") -> str:
    """Write an ``scontrol`` that adds its arguments to ``asked`` beside it, and return a PATH with it.

    Args:
        folder: Where it is written.
        then: What it does afterwards, in the language of the shell; its folder is ``$here``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "scontrol"
    file.write_text(f'#!/bin/sh\nhere=$(dirname "$0")\necho "$@" >> "$here/asked"\n{then}\n')
    file.chmod(0o755)
    return os.pathsep.join([str(folder), os.environ["PATH"]])
