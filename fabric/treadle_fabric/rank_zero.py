"""Things that only the first process of a run should do: messages, warnings, files.

``rank_zero_only.rank`` is taken from the environment on import, and set again by the strategy once it knows better.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from lightning_utilities.core.rank_zero import (
    WarningCache,
    rank_prefixed_message,
    rank_zero_deprecation,
    rank_zero_only,
    rank_zero_warn,
)

__all__ = [
    "WarningCache",
    "rank_prefixed_message",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def _rank_from_environment() -> int:
    for name in _RANK_VARIABLES:
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value)
    return 0


class _Console(logging.Handler):
    """Prints to stderr for as long as the program has not set up logging itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr)


def _console_logger(name: str) -> logging.Logger:
    logger = logging.getLogger(name)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_Console())
    return logger


_log = _console_logger("treadle_fabric")

# Lightning shares this function object: a rank that it has set already is right for us too
if getattr(rank_zero_only, "rank", None) is None:
    rank_zero_only.rank = _rank_from_environment()  # type: ignore[attr-defined]


@rank_zero_only
def rank_zero_info(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log at level INFO on rank 0; the arguments are those of :meth:`logging.Logger.info`."""
    _log.info(*args, stacklevel=stacklevel - 1, **kwargs)


@rank_zero_only
def rank_zero_debug(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log at level DEBUG on rank 0; the arguments are those of :meth:`logging.Logger.debug`."""
    _log.debug(*args, stacklevel=stacklevel - 1, **kwargs)
