"""The options of one call of ``self.log``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

__all__ = ["LogOptions"]

OPTIONS: Final = (
    "prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "enable_graph", "sync_dist", "add_dataloader_idx",
    "rank_zero_only",
)  # fmt: skip
LogOptions: TypeAlias = tuple[
    bool, bool | None, bool | None, bool | None, str | Callable[[Any], Any], bool, bool, bool, bool
]
