"""What FSDP was asked for (provisional)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ShardingOptions", "mixed_precision_policy", "parse_arguments"]


@dataclass(frozen=True)
class ShardingOptions:
    """Provisional."""

    policy: Any = None
    reshard_after_forward: Any = None
    offload: bool = False
    mixed_precision: Any = None
    hybrid: bool = False
    mesh: Any = None
    ignored: Any = ()
    state_dict_type: str = "sharded"


def parse_arguments(**kw: Any) -> ShardingOptions:
    """Provisional."""
    return ShardingOptions(
        kw["policy"] or kw["auto_wrap_policy"],
        kw["reshard_after_forward"],
        bool(kw["cpu_offload"]),
        kw["mixed_precision"],
        kw["sharding_strategy"] == "HYBRID_SHARD",
        kw["device_mesh"],
        (),
        kw["state_dict_type"],
    )


def mixed_precision_policy(precision: Any, given: Any) -> dict[str, Any]:
    """Provisional."""
    return {}
