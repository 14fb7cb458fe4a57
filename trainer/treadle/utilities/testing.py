"""Why a test cannot run on this machine, where tests that were written for Lightning look for it."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.imports import RequirementCache

from treadle.utilities.imports import _OMEGACONF_AVAILABLE, _RICH_AVAILABLE
from treadle_fabric.utilities import testing as _fabric

__all__ = ["_runif_reasons"]


def _runif_reasons(
    *,
    rich: bool = False,
    omegaconf: bool = False,
    psutil: bool = False,
    sklearn: bool = False,
    onnx: bool = False,
    onnxscript: bool = False,
    tensorrt: bool = False,
    **machine: Any,
) -> tuple[list[str], dict[str, bool]]:
    """Say what a test needs that is not here.

    Args:
        rich: The package rich.
        omegaconf: The package OmegaConf.
        psutil: The package psutil.
        sklearn: The package scikit-learn.
        onnx: The package onnx.
        onnxscript: The package onnxscript.
        tensorrt: The package torch_tensorrt.
        **machine: What the machine has to have, as for Fabric's tests: ``min_cuda_gpus``, ``standalone``, ...

    Returns:
        What is missing, and the marks of the test for pytest.
    """
    reasons, marks = _fabric._runif_reasons(**machine)
    packages = {
        "Rich": rich and not _RICH_AVAILABLE,
        "omegaconf": omegaconf and not _OMEGACONF_AVAILABLE,
        "psutil": psutil and not RequirementCache("psutil"),
        "scikit-learn": sklearn and not RequirementCache("scikit-learn"),
        "onnx": onnx and not RequirementCache("onnx"),
        "onnxscript": onnxscript and not RequirementCache("onnxscript"),
        "tensorrt": tensorrt and not RequirementCache("torch_tensorrt"),
    }
    return [*reasons, *(name for name, missing in packages.items() if missing)], marks
