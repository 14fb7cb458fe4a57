"""The options of one call of ``self.log``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

__all__ = ["GivenOptions", "LogOptions", "read_options"]

GivenOptions: TypeAlias = tuple[
    bool, bool | None, bool | None, bool | None, str | Callable[[Any], Any], bool, bool, bool, bool
]
"""The fields of :class:`LogOptions` as one call passes them: a plain tuple is made faster than a named one."""


class LogOptions(NamedTuple):
    """How the values of a name are logged. The fields are arguments of :meth:`treadle.LightningModule.log`."""

    prog_bar: bool = False
    logger: bool | None = None
    on_step: bool | None = None
    on_epoch: bool | None = None
    reduce_fx: str | Callable[[Any], Any] = "mean"
    enable_graph: bool = False
    sync_dist: bool = False
    add_dataloader_idx: bool = True
    rank_zero_only: bool = False


def read_options(saved: Mapping[str, Any] | tuple[Any, ...] | list[Any]) -> LogOptions:
    """Read the options in a checkpoint: by field name, or by position as earlier checkpoints have them."""
    return LogOptions(**saved) if isinstance(saved, Mapping) else LogOptions(*saved)
