"""A pseudo-terminal, and what a person would see on it."""

from __future__ import annotations

import functools
import inspect
import os
import pty
import re
import termios
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

COLUMNS = 80


class Terminal:
    """A pseudo-terminal of 80 columns and a small reading of what it would show."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, COLUMNS))
        self.stream = os.fdopen(slave, "w", buffering=1)
        self._bytes = bytearray()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while chunk := os.read(self._master, 65536):
                self._bytes += chunk
        except OSError:  # closed
            pass

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)

    def text(self) -> str:
        self.stream.flush()
        size = -1
        while size != len(self._bytes):
            size = len(self._bytes)
            time.sleep(0.02)
        return self._bytes.decode()

    def cursor_hidden(self) -> bool:
        text = self.text()
        return text.rfind("\x1b[?25l") > text.rfind("\x1b[?25h")

    def lines(self) -> list[str]:
        """The lines on the screen; those above what fits into a window are kept."""
        grid: dict[int, dict[int, str]] = {}
        row = col = 0
        for piece in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|.", self.text(), flags=re.DOTALL):
            if piece == "\r":
                col = 0
            elif piece == "\n":
                row += 1
            elif piece.startswith("\x1b"):
                count = int(re.sub(r"\D", "", piece) or 1)
                match piece[-1]:
                    case "A":
                        row -= count
                    case "B":
                        row += count
                    case "K" if "2" in piece:
                        grid[row] = {}
                    case "K":
                        grid[row] = {c: t for c, t in grid.get(row, {}).items() if c < col}
                    case "m" | "h" | "l":
                        pass
                    case _:
                        raise AssertionError(f"unexpected control sequence {piece!r}")
            else:
                if col == COLUMNS:
                    row, col = row + 1, 0
                grid.setdefault(row, {})[col] = piece
                col += 1
        last = max((r for r, cells in grid.items() if cells), default=-1)
        shown = ["".join(grid.get(r, {}).get(c, " ") for c in range(COLUMNS)).rstrip() for r in range(last + 1)]
        return shown


def in_terminal(test: Callable[..., None]) -> Callable[..., None]:
    """Give a test the argument ``terminal`` and make that its stdout and stderr.

    No fixture: pytest puts its own streams in place after the fixtures have run.
    """

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        os.environ.update(TERM="xterm", COLUMNS=str(COLUMNS), LINES="24")
        for name in ("PYCHARM_HOSTED", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            os.environ.pop(name, None)
        terminal = Terminal()
        try:
            with redirect_stdout(terminal.stream), redirect_stderr(terminal.stream):
                test(*args, terminal=terminal, **kwargs)
        finally:
            terminal.close()

    signature = inspect.signature(test)
    kept = [p for name, p in signature.parameters.items() if name != "terminal"]
    run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return run
