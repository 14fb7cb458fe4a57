"""Environments tell a process its rank, and the address and port where the ranks meet.

Start with ``environment.py``, the base class. Every other file is one way to start processes. Imports only the
foundation.
"""

from __future__ import annotations

from collections.abc import Mapping

from treadle_fabric.environments.environment import ClusterEnvironment
from treadle_fabric.environments.kubeflow import KubeflowEnvironment
from treadle_fabric.environments.local import LightningEnvironment, find_free_port
from treadle_fabric.environments.lsf import LSFEnvironment
from treadle_fabric.environments.mpi import MPIEnvironment
from treadle_fabric.environments.slurm import SLURMEnvironment
from treadle_fabric.environments.torchelastic import TorchElasticEnvironment

__all__ = [
    "ClusterEnvironment",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LightningEnvironment",
    "MPIEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
    "detect_environment",
    "find_free_port",
]


def detect_environment(environ: Mapping[str, str] | None = None) -> ClusterEnvironment:
    """Detect the environment of this process: torchrun, SLURM, LSF, MPI, or none of them.

    Args:
        environ: The environment variables to decide by. Default: those of this process.
    """
    # torchrun comes first because it also runs inside SLURM and LSF jobs.
    for kind in (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment):
        if kind.detect(environ):
            environment: ClusterEnvironment = kind()
            break
    else:
        environment = LightningEnvironment()
    environment.environ = environ
    return environment
