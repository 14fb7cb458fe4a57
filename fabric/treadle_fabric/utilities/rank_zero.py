"""What only rank 0 does, where users of Lightning Fabric look for it."""

from __future__ import annotations

import os

import lightning_utilities.core.rank_zero as rank_zero_module

from treadle_fabric.rank_zero import (
    WarningCache,
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
    "_get_rank",
    "rank_prefixed_message",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_module",
    "rank_zero_only",
    "rank_zero_warn",
]


class LightningDeprecationWarning(DeprecationWarning):
    """A warning of what a later version will not have."""


def _get_rank() -> int | None:
    """Read the rank from the environment variables of launchers and clusters; None where there is none."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        if (rank := os.environ.get(name)) is not None:
            return int(rank)
    return None
