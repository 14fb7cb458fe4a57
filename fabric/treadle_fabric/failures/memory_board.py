"""A board for members in one process: the protocol without files, stores and processes, for tests."""

from __future__ import annotations

from collections.abc import Sequence

from treadle_fabric.failures.board import Board

__all__ = ["MemoryBoard"]


class MemoryBoard(Board):
    """A board in a dict.

    Args:
        ranks: The global ranks that share the board.
        has_launcher: Whether one of the members, or the test, plays the launcher.
    """

    def __init__(self, ranks: Sequence[int], *, has_launcher: bool = True) -> None:
        super().__init__(ranks)
        self.has_launcher = has_launcher
        self.removed = False
        self._notes: dict[str, str] = {}

    def write(self, name: str, text: str) -> bool:
        if self.removed or name in self._notes:
            return False
        self._notes[name] = text
        return True

    def text(self, name: str) -> str | None:
        return None if self.removed else self._notes.get(name)

    def remove(self) -> None:
        self.removed = True
