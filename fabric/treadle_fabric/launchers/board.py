"""Notes that the processes of a run leave for one another, so that all learn who failed first.

Each note is written once, whole, by whoever comes first. N counts the failures of a process and R is a global rank:

    joined_R         rank R takes part; the number of its process
    failure_N        rank and traceback of the first to fail
    failed_N_R       rank R failed too, so nobody has to wait for it
    place_N_R        where rank R was when a collective failed
    final_N          a process goes down because of it, so the others must as well
    reported_N       somebody printed it
    told_N           it has been printed
    stopped_N_R      rank R said that it stops because of it
    ended_R          rank R has nothing left to do
    interrupted_R    rank R saw a KeyboardInterrupt
    crash_R          where rank R was when a signal like SIGABRT or SIGSEGV ended it
    over             the process with which the board goes is about to end
    released_R       rank R needs the board no longer

When every rank claims the same failure and none goes down, the scripts caught the exception and go on; the next one has
the next number.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

__all__ = ["Board", "Failure", "LaunchDirectory"]


@dataclass(frozen=True)
class Failure:
    """The first failure of a launch: whose it is, and its traceback or a sentence in place of one."""

    rank: int
    text: str
    hangs: bool = False
    """Whether a collective failed, so that it matters where every rank was."""
    status: int = 1
    """The exit status of the processes that it ends."""

    @property
    def summary(self) -> str:
        """The last line of the traceback, which names the exception."""
        lines = [line for line in self.text.strip().splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def __str__(self) -> str:
        is_traceback = "Traceback (most recent call last)" in self.text
        return f"rank {self.rank} failed:\n{self.text}" if is_traceback else self.text


class Board(ABC):
    """Where the notes are left."""

    has_launcher = True
    """Whether a launcher of ours started the processes and looks after them."""
    goes_with_process = False
    """Whether this process keeps the notes, so that none are left once it has ended."""
    _latest = 0

    @abstractmethod
    def post(self, name: str, text: str = "") -> bool:
        """Leave a note; True for the one who did, False where it is there already or nothing can be left."""

    @abstractmethod
    def read(self, name: str) -> str | None:
        """A note's text; None while there is none."""

    @abstractmethod
    def exists(self) -> bool:
        """False once notes can neither be left nor read."""

    @abstractmethod
    def remove(self) -> None:
        """Take it away: the launch is over."""

    @abstractmethod
    def crash_log(self, rank: int) -> TextIO | None:
        """The note ``crash_R`` as a file, to be written while the process dies; None where that cannot be."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a note of this name was left."""

    def claim(self, number: int, failure: Failure) -> bool:
        """Record a failure as the first of its number; False when another rank's is there already."""
        return self.post(f"failure_{number}", json.dumps(asdict(failure)))

    def failure(self, number: int) -> Failure | None:
        """The failure that claimed this number, if any."""
        text = self.read(f"failure_{number}")
        return None if text is None else Failure(**json.loads(text))

    def latest(self) -> int:
        """The number of the newest failure, 0 without any."""
        latest = self._latest  # another thread may count, too
        while self.has(f"failure_{latest + 1}"):
            latest += 1
        self._latest = latest
        return latest

    def is_final(self, number: int, ranks: Sequence[int]) -> bool:
        """Whether the other processes must stop: one goes down, or some did not fail and wait for those that did."""
        return self.has(f"final_{number}") or any(
            self.has(f"joined_{rank}") and not self.has(f"failed_{number}_{rank}") for rank in ranks
        )

    def claim_report(self, number: int) -> bool:
        """True once per failure, for the one who is to print it; and where no note can be left, or it would be lost."""
        return self.post(f"reported_{number}") or not self.has(f"reported_{number}")


class LaunchDirectory(Board):
    """A private folder that the processes which a launcher started on one machine share.

    Beside the notes it holds ``launch.json``: the launching process and the ranks it started.

    Args:
        directory: An existing folder.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    @classmethod
    def create(cls, ranks: Sequence[int]) -> LaunchDirectory:
        """A new one for these global ranks, launched by the calling process."""
        board = cls(tempfile.mkdtemp(prefix="treadle-launch-"))
        board.post("launch.json", json.dumps({"pid": os.getpid(), "ranks": list(ranks)}))
        return board

    def launch_info(self) -> tuple[int, list[int]]:
        """The launching process and the ranks on this machine."""
        info = json.loads((self.directory / "launch.json").read_text())
        return int(info["pid"]), [int(rank) for rank in info["ranks"]]

    def post(self, name: str, text: str = "") -> bool:
        # A link appears with its whole content or not at all, and only if nobody was faster.
        try:
            descriptor, draft = tempfile.mkstemp(dir=self.directory, prefix=".draft-")
        except OSError:
            return False  # the folder is gone: the launch is over
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.link(draft, self.directory / name)
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                os.unlink(draft)
        return True

    def read(self, name: str) -> str | None:
        try:
            return (self.directory / name).read_text(encoding="utf-8")
        except OSError:
            return None

    def has(self, name: str) -> bool:
        return (self.directory / name).exists()

    def exists(self) -> bool:
        return self.directory.exists()

    def crash_log(self, rank: int) -> TextIO | None:
        try:
            return open(self.directory / f"crash_{rank}", "w", encoding="utf-8")
        except OSError:
            return None

    def remove(self) -> None:
        gone = self.directory.with_name(f"{self.directory.name}-over")
        try:
            self.directory.rename(gone)  # or a note that is left meanwhile would keep the folder from being removed
        except OSError:
            gone = self.directory
        shutil.rmtree(gone, ignore_errors=True)
