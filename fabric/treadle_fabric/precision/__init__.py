"""Precisions: the dtypes of weights, inputs and outputs, loss scaling, and the names that users give them.

Start with ``precision.py``, the base class; ``names.py`` has the names, and ``closures.py`` tells which optimizers need
a closure. ``autocast.py``, ``half.py``, ``double.py``, ``xla.py``, ``float8.py``, ``transformer_engine.py`` and
``bitsandbytes.py`` have one precision each; the last three replace linear layers, which ``layers.py`` finds, and
``quantized.py`` has those of bitsandbytes. Imports only the foundation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treadle_fabric.checks import on_demand
from treadle_fabric.precision.autocast import MixedPrecision
from treadle_fabric.precision.closures import needs_closure, takes_closure
from treadle_fabric.precision.double import DoublePrecision
from treadle_fabric.precision.half import HalfPrecision
from treadle_fabric.precision.names import canonical_precision, make_precision, refuse_device
from treadle_fabric.precision.precision import Precision

if TYPE_CHECKING:
    from treadle_fabric.precision.bitsandbytes import BitsandbytesPrecision
    from treadle_fabric.precision.deepspeed import DeepSpeedPrecision
    from treadle_fabric.precision.float8 import Float8Precision
    from treadle_fabric.precision.fsdp import FSDPPrecision
    from treadle_fabric.precision.transformer_engine import TransformerEnginePrecision
    from treadle_fabric.precision.xla import XLAPrecision

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
    "canonical_precision",
    "make_precision",
    "needs_closure",
    "refuse_device",
    "takes_closure",
]

if not TYPE_CHECKING:
    __getattr__ = on_demand(  # few programs use one of these
        __name__,
        {
            "BitsandbytesPrecision": "treadle_fabric.precision.bitsandbytes",
            "DeepSpeedPrecision": "treadle_fabric.precision.deepspeed",
            "FSDPPrecision": "treadle_fabric.precision.fsdp",
            "Float8Precision": "treadle_fabric.precision.float8",
            "TransformerEnginePrecision": "treadle_fabric.precision.transformer_engine",
            "XLAPrecision": "treadle_fabric.precision.xla",
        },
    )
