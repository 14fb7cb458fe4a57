"""Environments tell a process its rank, and the address and port where the ranks meet.

Start with ``environment.py``, the base class. ``detection.py`` finds out what started this process, and ``taken.py``
whether its variables are its own or those of the rank that started it. ``slurm_job.py`` queues the job around a process
again. Every other file is one way to start processes.
Imports only the foundation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treadle_fabric.checks import on_demand
from treadle_fabric.environments.detection import (
    Detection,
    detect,
    detect_environment,
    examine_all,
    refuse_contradiction,
)
from treadle_fabric.environments.environment import ClusterEnvironment, Finding
from treadle_fabric.environments.kubeflow import KubeflowEnvironment
from treadle_fabric.environments.local import LightningEnvironment, find_free_port
from treadle_fabric.environments.lsf import LSFEnvironment
from treadle_fabric.environments.mpi import MPIEnvironment
from treadle_fabric.environments.slurm import SLURMEnvironment
from treadle_fabric.environments.slurm_job import requeue
from treadle_fabric.environments.taken import mark_rank_as_taken
from treadle_fabric.environments.torchelastic import TorchElasticEnvironment

if TYPE_CHECKING:
    from treadle_fabric.environments.ray import RayEnvironment
    from treadle_fabric.environments.xla import XLAEnvironment

__all__ = [
    "ClusterEnvironment",
    "Detection",
    "Finding",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LightningEnvironment",
    "MPIEnvironment",
    "RayEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
    "XLAEnvironment",
    "detect",
    "detect_environment",
    "examine_all",
    "find_free_port",
    "mark_rank_as_taken",
    "refuse_contradiction",
    "requeue",
]

if not TYPE_CHECKING:
    __getattr__ = on_demand(  # few programs use one of these
        __name__,
        {
            "RayEnvironment": "treadle_fabric.environments.ray",
            "XLAEnvironment": "treadle_fabric.environments.xla",
        },
    )
