"""provisional"""

from __future__ import annotations

from typing import Any


def recompute_activations(module: Any, options: Any) -> None:
    """Provisional."""
