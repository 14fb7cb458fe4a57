"""Parse durations, as the Trainer's arguments give them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from treadle_fabric import MisconfigurationException

__all__ = ["parse_duration"]

_UNITS = {"weeks", "days", "hours", "minutes", "seconds"}


def parse_duration(value: Any, name: str) -> timedelta | None:
    """Parse a duration: "DD:HH:MM:SS", a timedelta, or a dict of timedelta arguments; None stays None.

    Raises:
        MisconfigurationException: the value is none of these.
    """
    if value is None:
        return None
    duration = None
    if isinstance(value, timedelta):
        duration = value
    elif isinstance(value, str):
        parts = value.strip().split(":")
        if len(parts) == 4 and all(p.isdigit() for p in parts):
            days, hours, minutes, seconds = map(int, parts)
            duration = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    elif isinstance(value, Mapping) and value and set(value) <= _UNITS:
        duration = timedelta(**value)
    if duration is None:
        raise MisconfigurationException(
            f"{name}={value!r} is not a duration: give 'DD:HH:MM:SS', a timedelta, or a dict with keys of"
            f" {sorted(_UNITS)}."
        )
    return duration
