"""One line on the terminal that shows how far a search has come."""

from __future__ import annotations

import sys
import time
from typing import Final

__all__ = ["StatusLine"]

_EVERY_S: Final = 0.1


class StatusLine:
    """A line of stderr that is written over, and gone when the search ends; nothing where stderr is no terminal.

    Args:
        shown: Whether to show the line at all: on rank 0, and where no progress bar has the terminal.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown and sys.stderr.isatty()
        self._written = -_EVERY_S

    def show(self, text: str) -> None:
        """Write over the line, at most ten times a second."""
        now = time.monotonic()
        if self._shown and now - self._written >= _EVERY_S:
            self._written = now
            sys.stderr.write(f"\r\x1b[K{text[:100]}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
