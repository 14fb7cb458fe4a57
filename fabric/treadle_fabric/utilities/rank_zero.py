"""What only rank 0 does, where users of Lightning Fabric look for it."""

import lightning_utilities.core.rank_zero as rank_zero_module

from treadle_fabric.rank_zero import (
    LightningDeprecationWarning,
    WarningCache,
    rank_in_environment,
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

_get_rank = rank_in_environment
