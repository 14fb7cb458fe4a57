"""Environments tell a process its rank, and where the ranks meet."""

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
    """The environment of this process: torchrun, SLURM, LSF, MPI, or none of them.

    Args:
        environ: The environment variables to decide by; this process's own by default.
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
