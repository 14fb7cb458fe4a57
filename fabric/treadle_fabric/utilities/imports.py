"""Versions and packages that are here, where users of Lightning Fabric look for them."""

from __future__ import annotations

import platform
import sys

from lightning_utilities.core.imports import RequirementCache, compare_version

__all__ = ["RequirementCache", "compare_version"]

_IS_WINDOWS = platform.system() == "Windows"
_IS_INTERACTIVE = hasattr(sys, "ps1") or bool(sys.flags.interactive)
_PYTHON_GREATER_EQUAL_3_10_0 = sys.version_info >= (3, 10)
_PYTHON_GREATER_EQUAL_3_11_0 = sys.version_info >= (3, 11)
_NUMPY_AVAILABLE = RequirementCache("numpy")
_TORCHMETRICS_GREATER_EQUAL_1_0_0 = RequirementCache("torchmetrics>=1.0.0")
_TORCH_EQUAL_2_4_0 = RequirementCache("torch==2.4.0")
_TORCH_LESS_EQUAL_2_6 = RequirementCache("torch<2.7.0")
# Treadle needs torch 2.9
_TORCH_GREATER_EQUAL_2_0 = _TORCH_GREATER_EQUAL_2_1 = _TORCH_GREATER_EQUAL_2_2 = True
_TORCH_GREATER_EQUAL_2_3 = _TORCH_GREATER_EQUAL_2_4 = _TORCH_GREATER_EQUAL_2_4_1 = True
_TORCH_GREATER_EQUAL_2_5 = _TORCH_GREATER_EQUAL_2_6 = _TORCH_GREATER_EQUAL_2_7 = _TORCH_GREATER_EQUAL_2_8 = True
