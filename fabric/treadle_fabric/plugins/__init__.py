"""Precision, cluster environments and checkpoint IO, where users of Lightning Fabric look for them."""

from typing import TYPE_CHECKING

from treadle_fabric.checkpoint import CheckpointIO, TorchCheckpointIO
from treadle_fabric.checks import on_demand
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.precision import (
    BitsandbytesPrecision,
    DeepSpeedPrecision,
    DoublePrecision,
    Float8Precision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    TransformerEnginePrecision,
)

if TYPE_CHECKING:
    from treadle_fabric.checkpoint import XLACheckpointIO
    from treadle_fabric.precision import XLAPrecision

__all__ = [
    "BitsandbytesPrecision",
    "CheckpointIO",
    "ClusterEnvironment",
    "DeepSpeedPrecision",
    "DoublePrecision",
    "FSDPPrecision",
    "Float8Precision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
    "TorchCheckpointIO",
    "TransformerEnginePrecision",
    "XLACheckpointIO",
    "XLAPrecision",
]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = on_demand(
        __name__,
        {"XLACheckpointIO": "treadle_fabric.checkpoint", "XLAPrecision": "treadle_fabric.precision"},
        submodules=("collectives", "environments", "io", "precision"),
    )
