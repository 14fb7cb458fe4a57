"""Cluster environments, where users of a trainer look for them."""

from typing import TYPE_CHECKING

from treadle_fabric import not_yet
from treadle_fabric.environments import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

__all__ = [
    "ClusterEnvironment",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LightningEnvironment",
    "MPIEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = not_yet(__name__, {"XLAEnvironment"})
