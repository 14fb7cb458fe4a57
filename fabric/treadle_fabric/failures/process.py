"""How the process of a member reads the clock, prints and ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

__all__ = ["THIS_PROCESS", "Process", "SpareDescriptor", "end_process", "say"]


def say(text: str) -> None:
    """Print to stderr, in one write, so that lines of several processes do not mix."""
    if not text:
        return
    with contextlib.suppress(Exception):
        sys.stderr.write(text if text.endswith("\n") else text + "\n")
        sys.stderr.flush()


def end_process(status: int) -> NoReturn:
    """End this process now, from any thread, and take its worker processes along."""
    for child in multiprocessing.active_children():
        with contextlib.suppress(Exception):
            child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


@dataclass(frozen=True)
class Process:
    """What a member needs of the process that it is in; tests put a clock in here that they move themselves."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    say: Callable[[str], None] = say
    end: Callable[[int], NoReturn] = end_process

    def wait(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until the condition holds, but no longer than so many seconds."""
        deadline = self.now() + seconds
        while not condition() and self.now() < deadline:
            self.sleep(0.05)


THIS_PROCESS = Process()


class SpareDescriptor:
    """A file descriptor held back, so that a note can be left when "Too many open files" is the failure."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def hold(self) -> None:
        """Take one."""
        with contextlib.suppress(OSError):
            self._descriptor = os.open(os.devnull, os.O_RDONLY)

    def free(self) -> bool:
        """Give it back; True if one was held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None
