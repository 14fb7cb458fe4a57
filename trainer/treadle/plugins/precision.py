"""Precision, where users of a trainer look for it."""

from typing import TYPE_CHECKING

from treadle_fabric import not_yet
from treadle_fabric.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision

__all__ = ["DoublePrecision", "HalfPrecision", "MixedPrecision", "Precision"]

if not TYPE_CHECKING:  # which tell of any other name
    __getattr__ = not_yet(
        __name__,
        {"BitsandbytesPrecision", "DeepSpeedPrecision", "FSDPPrecision", "TransformerEnginePrecision", "XLAPrecision"},
    )
