"""Programs silence and redirect Lightning's messages by its names: here these govern Treadle's messages."""

from __future__ import annotations

import logging
from typing import Final

from treadle.names.table import PACKAGES
from treadle_fabric import filter_warnings_as

__all__ = ["LOGGER", "LOGGERS", "OF_RANK_ZERO", "govern_messages"]

LOGGER: Final = "treadle_fabric"  # the name under which all of Treadle logs

LOGGERS: Final = ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
"""Lightning's loggers of whole packages: what programs ask of one of these, they ask of all that is logged."""

OF_RANK_ZERO: Final = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "pytorch_lightning.utilities.rank_zero",
    "lightning_fabric.utilities.rank_zero",
)
"""Lightning's loggers of those modules by which it logs nearly all that users see."""


def govern_messages() -> None:
    """Make Lightning's loggers Treadle's, and let filters of Lightning's warnings filter those of Treadle.

    ``logging.getLogger("lightning.pytorch")`` is then Treadle's own logger; what a program has set on a logger of that
    name before is taken over. The logger of a single module stays a logger of its own, by which nothing is logged.
    """
    ours = logging.getLogger(LOGGER)
    for name in (*LOGGERS, *OF_RANK_ZERO):
        _be(ours, name)
    for package in PACKAGES:
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
