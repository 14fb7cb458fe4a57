"""Programs silence and redirect Lightning's messages by its names: here these govern Treadle's messages."""

from __future__ import annotations

import logging

from treadle.names.table import PACKAGES
from treadle_fabric import filter_warnings_as

__all__ = ["govern_messages"]

# The modules that log what users see, and whose loggers programs therefore look up.
_LOGGERS = (
    "",
    ".pytorch",
    ".fabric",
    ".pytorch.utilities.rank_zero",
    ".fabric.utilities.rank_zero",
    ".utilities.rank_zero",
)


def govern_messages() -> None:
    """Make Lightning's loggers Treadle's, and let filters of Lightning's warnings filter those of Treadle.

    ``logging.getLogger("lightning.pytorch")`` is then Treadle's own logger; what a program has set on a logger of that
    name before is taken over.
    """
    ours = logging.getLogger("treadle_fabric")
    for package in PACKAGES:
        for name in _LOGGERS:
            _be(ours, package + name)
        # by a filter for the package, or for all that is in it: ".*" and "\\." are how these end
        filter_warnings_as(package, f"{package}.module", f"{package}.pytorch.module", f"{package}.fabric.module")


def _be(ours: logging.Logger, name: str) -> None:
    """Make ``logging.getLogger(name)`` return our logger."""
    loggers = logging.Logger.manager.loggerDict
    theirs = loggers.get(name)
    if theirs is ours:
        return
    loggers[name] = ours
    if isinstance(theirs, logging.Logger):
        if theirs.level != logging.NOTSET:
            ours.setLevel(theirs.level)
        for handler in theirs.handlers:
            ours.addHandler(handler)
        for each in theirs.filters:
            ours.addFilter(each)
        ours.propagate &= theirs.propagate
    for below, logger in loggers.items():
        if below.startswith(f"{name}.") and isinstance(logger, logging.Logger) and logger is not ours:
            if logger.parent is theirs or logger.parent is logging.root:
                logger.parent = ours
