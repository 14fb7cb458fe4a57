"""Precisions: the dtypes of weights, inputs and outputs, loss scaling, and the names that users give them.

Start with ``precision.py``, the base class. ``autocast.py``, ``half.py`` and ``double.py`` have one precision each.
Imports only the foundation.
"""

from __future__ import annotations

from treadle_fabric.errors import unknown_name
from treadle_fabric.precision.autocast import MixedPrecision
from treadle_fabric.precision.double import DoublePrecision
from treadle_fabric.precision.half import HalfPrecision
from treadle_fabric.precision.precision import Precision, needs_closure

__all__ = [
    "DoublePrecision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
    "canonical_precision",
    "make_precision",
    "needs_closure",
]

_CANONICAL = ("64-true", "32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed")
_SHORT = {
    "64": "64-true",
    "fp64": "64-true",
    "float64": "64-true",
    "double": "64-true",
    "32": "32-true",
    "fp32": "32-true",
    "float32": "32-true",
    "16": "16-mixed",
    "fp16": "16-mixed",
    "float16": "16-mixed",
    "bf16": "bf16-mixed",
    "bfloat16": "bf16-mixed",
}


def canonical_precision(name: str | int | None) -> str:
    """Return the full name of a precision.

    Args:
        name: A full name such as ``"bf16-true"``, or a short one: 64, 32, 16, ``"bf16"``, ``"fp32"``. The short names
            for 16 bits mean mixed precision. ``None`` is ``"32-true"``.

    Raises:
        MisconfigurationException: There is no such precision.
    """
    if name is None:
        return "32-true"
    text = str(name)
    if isinstance(name, bool) or (text not in _CANONICAL and text not in _SHORT):
        raise unknown_name("precision", name, [*_CANONICAL, *_SHORT])
    return _SHORT.get(text, text)


def make_precision(name: str | int | None, device_type: str) -> Precision:
    """Make the precision with this name, short or full, for a device type such as ``"cuda"``.

    Raises:
        MisconfigurationException: There is no such precision.
    """
    canonical = canonical_precision(name)
    if canonical in ("16-mixed", "bf16-mixed"):
        return MixedPrecision(canonical, device_type)  # type: ignore[arg-type]
    if canonical in ("16-true", "bf16-true"):
        return HalfPrecision(canonical)  # type: ignore[arg-type]
    return DoublePrecision() if canonical == "64-true" else Precision()
