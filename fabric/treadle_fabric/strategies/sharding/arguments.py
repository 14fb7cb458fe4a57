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
        kw.get("policy") or kw.get("auto_wrap_policy"),
        kw.get("reshard_after_forward"),
        bool(kw.get("cpu_offload")),
        kw.get("mixed_precision"),
        kw.get("sharding_strategy") == "HYBRID_SHARD",
        kw.get("device_mesh"),
        (),
        kw.get("state_dict_type", "sharded"),
    )


def mixed_precision_policy(precision: Any, given: Any) -> dict[str, Any]:
    """Provisional."""
    return {}
