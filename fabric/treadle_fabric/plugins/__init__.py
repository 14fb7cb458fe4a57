"""Precision, cluster environments and checkpoint IO, where users of Lightning Fabric look for them."""

from typing import TYPE_CHECKING

from treadle_fabric.checkpoint import CheckpointIO, TorchCheckpointIO
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.errors import not_yet
from treadle_fabric.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision

__all__ = [
    "CheckpointIO",
    "ClusterEnvironment",
    "DoublePrecision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
    "TorchCheckpointIO",
]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = not_yet(
        __name__,
        {
            "BitsandbytesPrecision",
            "DeepSpeedPrecision",
            "FSDPPrecision",
            "TransformerEnginePrecision",
            "XLACheckpointIO",
            "XLAPrecision",
        },
    )
