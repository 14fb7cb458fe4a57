"""What only rank 0 of a run should do: messages, warnings, files.

``rank_zero_only.rank`` is read from the environment on import; the strategy sets it again once it knows the rank.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from itertools import count
from typing import Any

from lightning_utilities.core.rank_zero import (
    WarningCache,
    rank_prefixed_message,
    rank_zero_deprecation,
    rank_zero_only,
)

__all__ = [
    "LightningDeprecationWarning",
    "PossibleUserWarning",
    "WarningCache",
    "disable_possible_user_warnings",
    "filter_warnings_as",
    "rank_in_environment",
    "rank_prefixed_message",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "warn_user",
    "writes_here",
]

_ONLY_ON_RANK_ZERO = rank_zero_only(print).__code__
_LIBRARIES = ("treadle", "treadle_fabric", "lightning_utilities", "torch", "contextlib")
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


class PossibleUserWarning(UserWarning):
    """A warning of what is probably a mistake, and may be meant; see :func:`disable_possible_user_warnings`."""


def writes_here(function: Any) -> bool:
    """Whether a function does anything on this rank, or is one of :func:`rank_zero_only` on another rank."""
    return getattr(rank_zero_only, "rank", 0) == 0 or getattr(function, "__code__", None) is not _ONLY_ON_RANK_ZERO


def disable_possible_user_warnings(module: str = "") -> None:
    """Ignore warnings of what is probably a mistake, and may be meant.

    The same does the environment variable ``POSSIBLE_USER_WARNINGS=off`` for the whole program.

    Args:
        module: A regular expression for the names of the modules, of your program, in which they are ignored. Default:
            in all.
    """
    warnings.filterwarnings("ignore", module=module, category=PossibleUserWarning)


class LightningDeprecationWarning(DeprecationWarning):
    """A warning of what a later version will not have."""


_filtered_as: list[str] = []


def filter_warnings_as(*modules: str) -> None:
    """Let filters that ignore warnings of these modules hold for the warnings of Treadle, too.

    A warning of Treadle is otherwise one of the user's module that led to it.
    """
    _filtered_as.extend(modules)


def _is_ignored(message: str, category: type[Warning]) -> bool:
    """Whether the filter that decides on a warning is one for the modules of :func:`filter_warnings_as`."""
    for action, text, kind, module, _ in warnings.filters:
        if not issubclass(category, kind) or not (text is None or re.match(text, message)):
            continue
        if module is None:
            return False  # a filter for all modules, which `warnings.warn` finds itself
        if any(re.match(module, name) for name in _filtered_as):
            return action == "ignore"
    return False


def rank_in_environment() -> int | None:
    """Read the rank from the environment variables of launchers and clusters; None where there is none."""
    for name in _RANK_VARIABLES:
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value)
    return None


class _Console(logging.Handler):
    """A handler that prints to stderr until the program sets up logging itself."""

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

if os.environ.get("POSSIBLE_USER_WARNINGS", "").lower() in ("0", "off"):
    disable_possible_user_warnings()

# Lightning shares this function object: a rank that Lightning has set is right here, too
if getattr(rank_zero_only, "rank", None) is None:
    rank_zero_only.rank = rank_in_environment() or 0  # type: ignore[attr-defined]


def warn_user(message: str | Warning, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that points to the line of the user's code that led to it."""
    if _filtered_as and _is_ignored(str(message), type(message) if isinstance(message, Warning) else category):
        return
    for stacklevel in count(2):
        try:
            module = str(sys._getframe(stacklevel - 1).f_globals.get("__name__", ""))
        except ValueError:  # no such frame: a thread of ours
            stacklevel = 2
            break
        if module.partition(".")[0] not in _LIBRARIES:
            break
    warnings.warn(message, category, stacklevel=stacklevel)


@rank_zero_only
def rank_zero_warn(message: str | Warning, stacklevel: int = 4, category: type[Warning] = UserWarning) -> None:
    """Issue a warning on rank 0 that points to the line of the user's code; ``stacklevel`` is not needed for that."""
    warn_user(message, category)


@rank_zero_only
def rank_zero_info(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log at level INFO on rank 0; the arguments are those of :meth:`logging.Logger.info`."""
    _log.info(*args, stacklevel=stacklevel - 1, **kwargs)


@rank_zero_only
def rank_zero_debug(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log at level DEBUG on rank 0; the arguments are those of :meth:`logging.Logger.debug`."""
    _log.debug(*args, stacklevel=stacklevel - 1, **kwargs)
