"""What a program needs that this machine does not have: :mod:`treadle_fabric.utilities.testing` offers it to tests."""

from __future__ import annotations

import inspect
import os
import platform
import sys
from typing import Any, Final

import torch
from lightning_utilities.core.imports import RequirementCache
from packaging.version import Version

from treadle_fabric.accelerators.cuda import CUDAAccelerator
from treadle_fabric.accelerators.mps import MPSAccelerator
from treadle_fabric.errors import UnknownArgumentError, near_names

__all__ = ["missing_here"]

_PACKAGES: Final = {
    "rich": ("rich>=10.2.2", "Rich"),
    "omegaconf": ("omegaconf", "omegaconf"),
    "psutil": ("psutil", "psutil"),
    "sklearn": ("scikit-learn", "scikit-learn"),
    "onnx": ("onnx", "onnx"),
    "onnxscript": ("onnxscript", "onnxscript"),
    "tensorrt": ("torch_tensorrt", "tensorrt"),
}


def missing_here(
    *,
    min_cuda_gpus: int = 0,
    min_torch: str | None = None,
    max_torch: str | None = None,
    min_python: str | None = None,
    bf16_cuda: bool = False,
    tpu: bool = False,
    mps: bool | None = None,
    skip_windows: bool = False,
    standalone: bool = False,
    deepspeed: bool = False,
    dynamo: bool = False,
    linux_only: bool = False,
    **packages: bool,
) -> tuple[list[str], dict[str, bool]]:
    """Say what a test needs that is not here.

    Args:
        min_cuda_gpus: The number of CUDA devices.
        min_torch: The oldest version of PyTorch.
        max_torch: The first version of PyTorch that is too new.
        min_python: The oldest version of Python.
        bf16_cuda: CUDA devices that compute in bfloat16.
        tpu: A TPU.
        mps: An Apple GPU; False: none.
        skip_windows: Not on Windows.
        standalone: A process of its own, as ``PL_RUN_STANDALONE_TESTS=1`` says.
        deepspeed: The package DeepSpeed.
        dynamo: ``torch.compile`` works here.
        linux_only: Linux.
        **packages: Further packages: ``rich``, ``omegaconf``, ``psutil``, ``sklearn``, ``onnx``, ``onnxscript`` and
            ``tensorrt``.

    Returns:
        What is missing, and the marks of the test for pytest.

    Raises:
        UnknownArgumentError: A keyword is none of these.
    """
    if unknown := [name for name in packages if name not in _PACKAGES]:
        known = {*inspect.signature(missing_here).parameters, *_PACKAGES} - {"packages"}
        raise UnknownArgumentError(f"missing_here({unknown[0]}=...) is no argument. {near_names(unknown[0], known)}")
    torch_version, windows = Version(Version(torch.__version__).base_version), sys.platform == "win32"
    gpus_run = os.environ.get("PL_RUN_CUDA_TESTS", "1") != "0"
    missing: dict[str, bool] = {
        f"GPUs>={min_cuda_gpus}": min_cuda_gpus > 0 and (not gpus_run or torch.cuda.device_count() < min_cuda_gpus),
        f"torch>={min_torch}, {torch.__version__} installed": min_torch is not None
        and torch_version < Version(min_torch),
        f"torch<{max_torch}, {torch.__version__} installed": max_torch is not None
        and torch_version >= Version(max_torch),
        f"python>={min_python}": min_python is not None and Version(platform.python_version()) < Version(min_python),
        "CUDA device bf16": bf16_cuda and not (CUDAAccelerator.is_available() and torch.cuda.is_bf16_supported()),
        "unimplemented on Windows": skip_windows and windows,
        "TPU": tpu and not _has_tpu(),
        "MPS": mps is True and not MPSAccelerator.is_available(),
        "not MPS": mps is False and MPSAccelerator.is_available(),
        "Standalone execution": standalone and os.environ.get("PL_RUN_STANDALONE_TESTS", "0") != "1",
        "Deepspeed": deepspeed and not RequirementCache("deepspeed"),
        "torch.compile": dynamo and windows,
        "only Linux": linux_only and platform.system() != "Linux",
    }
    for name, needed in packages.items():
        requirement, reason = _PACKAGES[name]
        missing[reason] = needed and not RequirementCache(requirement)
    marks: dict[str, Any] = {"min_cuda_gpus": min_cuda_gpus > 0, "tpu": tpu, "standalone": standalone}
    return [reason for reason, applies in missing.items() if applies], {k: True for k, v in marks.items() if v}


def _has_tpu() -> bool:
    from treadle_fabric.accelerators.xla import XLAAccelerator  # for the few who use it

    return XLAAccelerator.is_available()
