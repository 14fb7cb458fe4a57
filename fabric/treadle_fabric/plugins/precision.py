"""Precision, where users of Lightning Fabric look for it."""

from typing import TYPE_CHECKING

from treadle_fabric.checks import on_demand
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
    from treadle_fabric.precision import XLAPrecision

__all__ = [
    "BitsandbytesPrecision",
    "DeepSpeedPrecision",
    "DoublePrecision",
    "FSDPPrecision",
    "Float8Precision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
    "TransformerEnginePrecision",
    "XLAPrecision",
]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = on_demand(__name__, {"XLAPrecision": "treadle_fabric.precision"})
