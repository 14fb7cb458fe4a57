"""What only rank 0 does, where users of a trainer look for it."""

import lightning_utilities.core.rank_zero as rank_zero_module
from lightning_utilities.core.rank_zero import WarningCache

from treadle_fabric import (
    LightningDeprecationWarning,
    rank_prefixed_message,
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)

__all__ = [
    "LightningDeprecationWarning",
    "WarningCache",
    "rank_prefixed_message",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_module",
    "rank_zero_only",
    "rank_zero_warn",
]
