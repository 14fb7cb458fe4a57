"""Read the Trainer's argument ``profiler``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from treadle.profilers.advanced import AdvancedProfiler
from treadle.profilers.passthrough import PassThroughProfiler
from treadle.profilers.profiler import Profiler
from treadle.profilers.pytorch import PyTorchProfiler
from treadle.profilers.simple import SimpleProfiler
from treadle_fabric import MisconfigurationException, near_names

__all__ = ["choose_profiler"]


def _xla() -> Profiler:
    from treadle.profilers.xla import XLAProfiler  # for the few who use it

    return XLAProfiler()


_NAMED: Final[dict[str, Callable[[], Profiler]]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
    "passthrough": PassThroughProfiler,
    "xla": _xla,
}


def choose_profiler(given: Any) -> Profiler:
    """Make the profiler of a Trainer.

    Args:
        given: A profiler; "simple", "advanced", "pytorch", "passthrough" or "xla"; None for one that does nothing.

    Raises:
        MisconfigurationException: it is none of those.
    """
    if given is None:
        return PassThroughProfiler()
    if isinstance(given, Profiler):
        return given
    if isinstance(given, str):
        if (make := _NAMED.get(given.lower())) is not None:
            return make()
        raise MisconfigurationException(
            f"profiler={given!r} must be {', '.join(map(repr, _NAMED))}, a Profiler, or None."
            f" {near_names(given, list(_NAMED))}"
        )
    what = f"the class {given.__name__}: pass an instance" if isinstance(given, type) else f"{given!r}"
    raise MisconfigurationException(
        f"profiler is {what}; it must be a `treadle.profilers.Profiler`, {', '.join(map(repr, _NAMED))}, or None."
    )
