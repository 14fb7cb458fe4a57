"""Versions and packages that are here, where users of a trainer look for them."""

import sys

from lightning_utilities.core.imports import RequirementCache, compare_version, package_available

__all__ = ["RequirementCache", "compare_version", "package_available"]

_IS_WINDOWS = sys.platform == "win32"
_PYTHON_GREATER_EQUAL_3_11_0 = True
_TORCH_GREATER_EQUAL_2_6 = _TORCH_GREATER_EQUAL_2_8 = True  # Treadle needs torch 2.9
_TORCH_EQUAL_2_8 = RequirementCache("torch>=2.8.0,<2.9.0")
_TORCH_EQUAL_2_9 = RequirementCache("torch>=2.9.0,<2.10.0")
_TORCHMETRICS_GREATER_EQUAL_0_8_0 = RequirementCache("torchmetrics>=0.8.0")
_TORCHMETRICS_GREATER_EQUAL_0_9_1 = RequirementCache("torchmetrics>=0.9.1")
_TORCHMETRICS_GREATER_EQUAL_0_11 = RequirementCache("torchmetrics>=0.11.0")
_TORCHMETRICS_GREATER_EQUAL_1_0_0 = RequirementCache("torchmetrics>=1.0.0")
_OMEGACONF_AVAILABLE = package_available("omegaconf")
_TORCHVISION_AVAILABLE = RequirementCache("torchvision")
_RICH_AVAILABLE = RequirementCache("rich>=10.2.2")
