"""Precision and checkpoint IO, where users of a trainer look for them."""

from typing import TYPE_CHECKING

from treadle.run.layer_sync import LayerSync, TorchSyncBatchNorm
from treadle_fabric import on_demand
from treadle_fabric.checkpoint import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
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
    "AsyncCheckpointIO",
    "BitsandbytesPrecision",
    "CheckpointIO",
    "DeepSpeedPrecision",
    "DoublePrecision",
    "FSDPPrecision",
    "Float8Precision",
    "HalfPrecision",
    "LayerSync",
    "MixedPrecision",
    "Precision",
    "TorchCheckpointIO",
    "TorchSyncBatchNorm",
    "TransformerEnginePrecision",
    "XLACheckpointIO",
    "XLAPrecision",
]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = on_demand(
        __name__,
        {"XLACheckpointIO": "treadle_fabric.checkpoint", "XLAPrecision": "treadle_fabric.precision"},
        submodules=("environments", "io", "layer_sync", "precision"),
    )
