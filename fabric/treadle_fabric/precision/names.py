"""The names that users give to precisions."""

from __future__ import annotations

import torch

from treadle_fabric.errors import DeviceUnavailableError, MisconfigurationException, unknown_name
from treadle_fabric.precision.autocast import MixedPrecision
from treadle_fabric.precision.double import DoublePrecision
from treadle_fabric.precision.half import HalfPrecision
from treadle_fabric.precision.precision import Precision

__all__ = ["canonical_precision", "make_precision", "refuse_device"]

_FLOAT8 = ("fp8-mixed", "fp8-true")
_ENGINE = {"transformer-engine": torch.bfloat16, "transformer-engine-float16": torch.float16}
_CANONICAL = ("64-true", "32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", *_FLOAT8, *_ENGINE)
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
    "fp8": "fp8-mixed",
    "float8": "fp8-mixed",
}


def canonical_precision(name: str | int | None) -> str:
    """Return the full name of a precision.

    Args:
        name: A full name such as ``"bf16-true"``, or a short one: 64, 32, 16, ``"bf16"``, ``"fp32"``, ``"fp8"``. The
            short names for 16 and 8 bits mean mixed precision. ``None`` is ``"32-true"``.

    Raises:
        MisconfigurationException: There is no such precision.
    """
    if name is None:
        return "32-true"
    text = str(name)
    if text.startswith(("nf4", "fp4", "int8")):
        raise MisconfigurationException(
            f"precision={name!r} is a way to quantize layers, which has more arguments than a name can have. Use "
            f"plugins=BitsandbytesPrecision({name!r})."
        )
    if isinstance(name, bool) or (text not in _CANONICAL and text not in _SHORT):
        raise unknown_name("precision", name, [*_CANONICAL, *_SHORT])
    return _SHORT.get(text, text)


def make_precision(name: str | int | None, device_type: str) -> Precision:
    """Make the precision with this name, short or full, for a device type such as ``"cuda"``.

    Raises:
        MisconfigurationException: There is no such precision.
        DeviceUnavailableError: The devices cannot compute in this precision.
        MissingPackageError: The precision needs a package that is not installed.
    """
    canonical = canonical_precision(name)
    refuse_device(canonical, device_type)
    if device_type == "xla":
        from treadle_fabric.precision.xla import XLAPrecision  # for the few who use it

        return XLAPrecision(canonical)  # type: ignore[arg-type]
    if canonical in _FLOAT8:
        from treadle_fabric.precision.float8 import Float8Precision  # for the few who use it

        return Float8Precision(canonical)  # type: ignore[arg-type]
    if canonical in _ENGINE:
        from treadle_fabric.precision.transformer_engine import TransformerEnginePrecision  # as above

        return TransformerEnginePrecision(weights_dtype=_ENGINE[canonical])
    if canonical in ("16-mixed", "bf16-mixed"):
        return MixedPrecision(canonical, device_type)  # type: ignore[arg-type]
    if canonical in ("16-true", "bf16-true"):
        return HalfPrecision(canonical)  # type: ignore[arg-type]
    return DoublePrecision() if canonical == "64-true" else Precision()


def refuse_device(name: str, device_type: str) -> None:
    """Refuse a precision, given by its full name, that no device of a type such as ``"cpu"`` can compute in.

    Raises:
        DeviceUnavailableError: No such device can.
    """
    if name in _FLOAT8 or name in _ENGINE:
        from treadle_fabric.precision.layers import INSTEAD, check_on_cuda  # for the few who use these

        check_on_cuda(name, device_type, INSTEAD)
    if device_type in ("xla", "tpu") and not name.endswith("-true"):
        raise DeviceUnavailableError(
            f"precision={name!r} is not there for accelerator='tpu', where everything has one dtype. Use 'bf16-true',"
            " '32-true' or '16-true'."
        )
