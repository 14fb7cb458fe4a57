"""Precisions under the name that Lightning has for those of FSDP."""

from __future__ import annotations

from typing import Any

import torch

from treadle_fabric.precision.autocast import MixedPrecision
from treadle_fabric.precision.names import canonical_precision, make_precision
from treadle_fabric.precision.precision import Precision

__all__ = ["FSDPPrecision"]


class FSDPPrecision(Precision):
    """Makes the precision of a name: every strategy takes the same ones, and ``"fsdp"`` shards what they cast.

    Args:
        precision: ``"32-true"``, ``"16-true"``, ``"bf16-true"``, ``"16-mixed"`` or ``"bf16-mixed"``.
        scaler: A gradient scaler for ``"16-mixed"``. Default: a ``torch.amp.GradScaler``.

    Returns:
        A ``Precision``, ``HalfPrecision`` or ``MixedPrecision``.

    Raises:
        MisconfigurationException: There is no such precision, or it scales no gradients and got a scaler.
    """

    def __new__(cls, precision: str, scaler: Any | None = None) -> Any:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if scaler is None:
            return make_precision(precision, device)
        return MixedPrecision(canonical_precision(precision), device, scaler)  # type: ignore[arg-type]

    def __init__(self, precision: str, scaler: Any | None = None) -> None:
        super().__init__()  # never called: what ``__new__`` returns is no such object
