"""How many floating-point operations a second a chip can do at most, by its data sheet."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Final

import torch

from treadle_fabric.rank_zero import rank_zero_warn

__all__ = ["PEAK_RATES", "compute_dtype", "get_available_flops"]


def _rates(fp32: float | None = None, half: float | None = None, **others: float) -> dict[str, float]:
    """The rates of a chip in 10**12 operations a second; ``half``: of float16 and bfloat16."""
    rates = {"float32": fp32, "float16": half, "bfloat16": half, **others}
    return {name: rate * 1e12 for name, rate in rates.items() if rate is not None}


def _geforce(fp32: float, half: float, **others: float) -> dict[str, float]:
    """A GeForce card from Ampere on: TF32 has the rate of float32, and half types that of sums in float32."""
    return _rates(fp32, half, tf32=fp32, **others)


_HOPPER: Final = _rates(66.9, 989.4, float64=66.9, tf32=494.7, float8=1978.9, int8=1978.9)
_HOPPER_NVL: Final = _rates(60, 835.5, float64=60, tf32=417.5, float8=1670.5, int8=1670.5)
_AMPERE: Final = _rates(19.5, 312, float64=19.5, tf32=156, int8=624)

PEAK_RATES: Final[Mapping[str, Mapping[str, float]]] = {
    # NVIDIA, data centre
    "b300": _rates(75, 2250, tf32=1125, float8=4500),
    "gb300": _rates(80, 2500, tf32=1250, float8=5000),
    "b200": _rates(75, 2250, float64=37, tf32=1125, float8=4500, int8=4500),
    "gb200": _rates(80, 2500, float64=40, tf32=1250, float8=5000, int8=5000),
    "h200": _HOPPER,
    "h200 nvl": _HOPPER_NVL,
    "gh200": _HOPPER,
    "h100": _HOPPER,
    "h100 nvl": _HOPPER_NVL,
    "h100 pcie": _rates(51.2, 756.5, float64=51.2, tf32=378, float8=1513, int8=1513),
    "h800": {**_HOPPER, "float64": 1e12},
    "a100": _AMPERE,
    "a100 pcie": _AMPERE,
    "a800": _AMPERE,
    "a800 pcie": _AMPERE,
    "a40": _rates(37.4, 149.7, tf32=74.8, int8=299.3),
    "a10": _rates(31.2, 125, tf32=62.5, int8=250),
    "a10g": _rates(None, 70, tf32=35, int8=140),
    "l40s": _rates(91.6, 362.05, tf32=183, float8=733, int8=733),
    "l40": _rates(90.5, 181.05, tf32=90.5, float8=362, int8=362),
    "l4": _rates(30.3, 121, tf32=60, float8=242.5, int8=242.5),
    "t4": _rates(8.1, float16=65, int8=130),
    "v100": _rates(15.7, float16=125, float64=7.8),
    "v100 pcie": _rates(14, float16=112, float64=7),
    "v100s pcie": _rates(16.4, float16=130, float64=8.2),
    # NVIDIA, workstation
    "rtx 6000 ada generation": _rates(91.1, 364.2, tf32=182.1, float8=728.5, int8=728.5),
    "rtx a6000": _rates(38.7, 154.8, tf32=77.4, int8=309.7),
    "titan rtx": _rates(16.3, float16=130.5, int8=261),
    # NVIDIA, GeForce
    "rtx 5090": _geforce(104.8, 209.5, float8=419, int8=838),
    "rtx 5080": _geforce(56.3, 112.6, float8=225.1, int8=450.2),
    "rtx 5070 ti": _geforce(43.9, 87.9, float8=175.8, int8=351.5),
    "rtx 5070": _geforce(30.9, 61.7, float8=123.5, int8=246.9),
    "rtx 4090": _geforce(82.6, 165.2, float8=330.3, int8=660.6),
    "rtx 4080 super": _geforce(52.2, 104.4, float8=208.9, int8=417.7),
    "rtx 4080": _geforce(48.7, 97.5, float8=194.9, int8=389.9),
    "rtx 4070 ti super": _geforce(44.1, 88.2, float8=176.4, int8=352.8),
    "rtx 4070 ti": _geforce(40.1, 80.2, float8=160.4, int8=320.7),
    "rtx 4070 super": _geforce(35.5, 71, float8=141.9, int8=283.9),
    "rtx 4070": _geforce(29.1, 58.3, float8=116.6, int8=233.2),
    "rtx 4060 ti": _geforce(22.1, 44.1, float8=88.3, int8=176.5),
    "rtx 4060": _geforce(15.1, 30.2, float8=60.5, int8=121),
    "rtx 3090 ti": _geforce(40, 80, int8=320),
    "rtx 3090": _geforce(35.6, 71, int8=284),
    "rtx 3080 ti": _geforce(34.1, 68.2, int8=272.8),
    "rtx 3080": _geforce(29.8, 59.5, int8=238),
    "rtx 3070 ti": _geforce(21.7, 43.5, int8=174),
    "rtx 3070": _geforce(20.3, 40.6, int8=162.6),
    "rtx 3060 ti": _geforce(16.2, 32.4, int8=129.6),
    "rtx 3060": _geforce(12.7, 25.5, int8=101.9),
    "rtx 2080 ti": _rates(13.4, float16=53.8, int8=215.2),
    "rtx 2080 super": _rates(11.2, float16=44.6, int8=178.4),
    "rtx 2080": _rates(10.1, float16=40.3, int8=161.1),
    "rtx 2070 super": _rates(9.1, float16=36.3, int8=145),
    "rtx 2070": _rates(7.5, float16=29.9, int8=119.4),
    "rtx 2060 super": _rates(7.2, float16=28.7, int8=114.9),
    "rtx 2060": _rates(6.5, float16=25.8, int8=103.2),
    # AMD
    "mi300x": _rates(163.4, 1307.4, float64=163.4, tf32=653.7, float8=2614.9, int8=2614.9),
    "mi325x": _rates(163.4, 1307.4, float64=163.4, tf32=653.7, float8=2614.9, int8=2614.9),
    # Google: a device of torch_xla, which is a core of a chip of v2 and v3, and a chip of the others
    "tpu v2": _rates(bfloat16=22.5),
    "tpu v3": _rates(bfloat16=61.5),
    "tpu v4": _rates(bfloat16=275, int8=275),
    "tpu v5e": _rates(bfloat16=197, int8=393),
    "tpu v5p": _rates(bfloat16=459, int8=918),
    "tpu v6e": _rates(bfloat16=918, int8=1836),
}
"""By chip, and by the type of the numbers, operations a second.

Source: the data sheets of the vendors, and for GeForce and TITAN NVIDIA's white papers of the architectures. Rates are
those of tensor or matrix cores where the chip has these for the type, dense, without sparsity, at boost clock; of half
types those whose sums are in float32. A type that is missing is one that the chip has no rate for, or no sure one.
"""

_NOISE: Final = re.compile(r"\b(nvidia|tesla|geforce|amd|instinct|google|graphics|oam|ac|sxm\d*|hbm\w*|\d+ ?gb?)\b")
_TPUS: Final = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v6": "v6e"}
_OF_PRECISION: Final[Mapping[str, torch.dtype | str]] = {
    "64": torch.float64,
    "32": torch.float32,
    "16": torch.float16,
    "bf16": torch.bfloat16,
    "transformer": "float8",
    "fp8": "float8",
}


def compute_dtype(precision: str) -> torch.dtype | str:
    """Return the type of numbers in which matrix products are made under a precision, such as "bf16-mixed"."""
    return _OF_PRECISION.get(precision.partition("-")[0], torch.float32)


def get_available_flops(device: torch.device, dtype: torch.dtype | str) -> int | None:
    """Return how many operations a second a device can do at most: see :data:`PEAK_RATES`.

    Args:
        device: The device.
        dtype: The type of the numbers; also "float8" and "int8". float32 counts as TF32 where
            ``torch.set_float32_matmul_precision`` allows that and the chip has it.

    Returns:
        The rate; None on the CPU and on a Mac, and with a warning for a chip or a type that the table does not have.
    """
    name = _name(device)
    if name is None:
        return None
    chip = _chip(name)
    if chip not in PEAK_RATES:
        rank_zero_warn(
            f"FLOPs not found for {name!r}: its peak rate is not known, so that no share of it (MFU) is computed:"
            " pass `available_flops` with the number in its data sheet."
        )
        return None
    rates, kind = PEAK_RATES[chip], str(dtype).removeprefix("torch.")
    kind = "float8" if kind.startswith(("float8", "fp8")) else kind
    if kind == "float32" and "tf32" in rates and torch.get_float32_matmul_precision() != "highest":
        kind = "tf32"
    if kind not in rates:
        rank_zero_warn(
            f"{name!r} does not support {dtype}: its data sheet has no rate for it, so that no share (MFU) is computed."
            f" It has rates for {', '.join(rates)}: compute in one of these, or pass `available_flops`."
        )
        return None
    return int(rates[kind])


def _name(device: torch.device) -> str | None:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xla":
        return f"TPU {_tpu_type()}"
    return None


def _tpu_type() -> str:
    """The type of this machine's TPU, such as "v5litepod-8"."""
    if found := os.environ.get("TPU_ACCELERATOR_TYPE"):
        return found
    try:
        from torch_xla._internal import tpu  # an extra

        environment: Mapping[str, Any] = tpu.get_tpu_env()
        return str(environment.get("TYPE") or environment.get("ACCELERATOR_TYPE"))
    except Exception:  # no TPU machine, or another torch_xla
        return "unknown"


def _chip(name: str) -> str:
    """The chip's name as in the table; a part of a chip and a laptop's chip have other names."""
    if name.startswith("TPU "):
        kind = name[4:].lower().partition("-")[0]
        return f"tpu {_TPUS.get(kind, kind)}"
    return " ".join(_NOISE.sub(" ", name.lower().replace("-", " ")).split())
