"""Cluster environments, where users of Lightning Fabric look for them."""

from typing import TYPE_CHECKING

from treadle_fabric.checks import on_demand
from treadle_fabric.environments import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

if TYPE_CHECKING:
    from treadle_fabric.environments import RayEnvironment, XLAEnvironment

__all__ = [
    "ClusterEnvironment",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LightningEnvironment",
    "MPIEnvironment",
    "RayEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
    "XLAEnvironment",
]

if not TYPE_CHECKING:
    __getattr__ = on_demand(
        __name__, dict.fromkeys(("RayEnvironment", "XLAEnvironment"), "treadle_fabric.environments")
    )
