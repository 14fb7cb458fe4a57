"""The board on which the processes of a run leave notes for one another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TextIO, TypeVar, overload

from treadle_fabric.failures.notes import Crash, Failed, Failure, Final, FirstFailure, Joined, Note, Reporting

__all__ = ["Board"]

C = TypeVar("C")


class Board(ABC):
    """Notes that are each written once, whole, by the process that comes first, and never change.

    Args:
        ranks: The global ranks that share the board.
    """

    has_launcher = True
    """Whether a launcher of ours started the processes and looks after them."""
    launcher_is_rank = True
    """Whether the launcher is the first of the ranks."""
    spans_hosts = False
    """Whether the launcher is one of several, each on a machine of its own."""
    goes_with_process = False
    """Whether this process hosts the notes, so that none are left once it has ended."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self._newest = 0

    @abstractmethod
    def write(self, name: str, text: str) -> bool:
        """Leave a text under a name; True for the process that did, False where one is there or none can be left."""

    @abstractmethod
    def text(self, name: str) -> str | None:
        """The text under a name; None while there is none."""

    @abstractmethod
    def remove(self) -> None:
        """Take the board away: the launch is over."""

    def crash_log(self, rank: int) -> TextIO | None:
        """The note :class:`Crash` as a file, to be written while the process dies; None where that cannot be."""
        return None

    @overload
    def post(self, note: Note[str]) -> bool: ...
    @overload
    def post(self, note: Note[C], content: C) -> bool: ...
    def post(self, note: Note[C], content: C = "") -> bool:  # type: ignore[assignment]
        """Write a note; True for the process that did, False where the note is there or none can be left."""
        return self.write(note.name, note.encode(content))

    def read(self, note: Note[C]) -> C | None:
        """The content of a note; None while it is not there."""
        text = self.text(note.name)
        return None if text is None else note.decode(text)

    def has(self, note: Note[C]) -> bool:
        """Whether a note is there."""
        return self.text(note.name) is not None

    def crash(self, rank: int) -> str:
        """What faulthandler left when a signal ended the rank; empty where nothing."""
        return self.read(Crash(rank)) or ""

    def claim(self, failure: Failure) -> bool:
        """Record a failure as the first of its number; False when another rank's is there already."""
        return self.post(FirstFailure(failure.number), failure)

    def failure(self, number: int) -> Failure | None:
        """The first failure of this number, None while there is none."""
        return self.read(FirstFailure(number))

    def newest(self) -> int:
        """The number of the newest failure, 0 without any."""
        newest = self._newest  # another thread may count, too
        while self.has(FirstFailure(newest + 1)):
            newest += 1
        self._newest = newest
        return newest

    def newest_failure(self) -> Failure | None:
        """The newest failure, None without any."""
        return self.failure(self.newest())

    def is_final(self, number: int) -> bool:
        """Whether all must stop: a process ends because of it, or a rank did not fail and waits for those that did."""
        return self.has(Final(number)) or any(
            self.has(Joined(rank)) and not self.has(Failed(number, rank)) for rank in self.ranks
        )

    def final_failure(self) -> Failure | None:
        """The newest failure, if all must stop because of it."""
        failure = self.newest_failure()
        return failure if failure is not None and self.is_final(failure.number) else None

    def claim_report(self, number: int) -> bool:
        """True for the one process that is to print the failure, and where no note can be left: it would be lost."""
        return self.post(Reporting(number)) or not self.has(Reporting(number))
