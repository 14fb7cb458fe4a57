"""provisional"""

from __future__ import annotations

from typing import Any


def materialize(module: Any, device: Any) -> None:
    """Provisional."""
