"""provisional"""

from __future__ import annotations

from typing import Any

from torch.nn import Module


def modules_to_shard(module: Module, policy: Any) -> list[Module]:
    """Provisional."""
    if policy is None:
        return []
    return [m for m in reversed(list(module.modules())) if m is not module and isinstance(m, tuple(policy))]
