"""The notes on a board: one type for each, which knows its name there and how its content becomes text.

What each note means, who writes it and who reads it is the table in :mod:`treadle_fabric.failures`.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast

C = TypeVar("C")


class Failure(NamedTuple):
    """A failure of a launch: the rank on which it happened first, and a traceback or a sentence in place of one."""

    number: int
    """Failures of a launch count from 1; where the scripts catch one on all ranks, the run and the count go on."""
    rank: int
    text: str
    hangs: bool = False
    """Whether a collective failed, so that it matters where each rank was."""
    status: int = 1
    """The exit status of the processes that this failure ends."""
    host: str = ""
    """The host of the rank; empty where that is not known."""

    @property
    def who(self) -> str:
        """The rank, or the launching process, and its host where that is not this one."""
        who = f"rank {self.rank}" if self.rank >= 0 else "the launching process"
        return f"{who} on host {self.host}" if self.is_elsewhere else who

    @property
    def is_elsewhere(self) -> bool:
        """Whether this happened on another host, as far as that is known."""
        return self.host not in ("", socket.gethostname())

    @property
    def is_traceback(self) -> bool:
        """Whether the text is a traceback, and not a sentence."""
        return "Traceback (most recent call last)" in self.text

    @property
    def summary(self) -> str:
        """The last line of the traceback, which names the exception."""
        lines = [line for line in self.text.strip().splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def __str__(self) -> str:
        if self.is_traceback:
            return f"{self.who} failed:\n{self.text}"
        return f"on host {self.host}: {self.text}" if self.is_elsewhere and self.host not in self.text else self.text


class Whereabouts(NamedTuple):
    """Where the main thread of a rank was: whether in a collective, and the lines of its stack."""

    waits: bool
    stack: str


class Progress(NamedTuple):
    """How far a rank is in a loop over batches that may have unequal numbers on the ranks."""

    batches: int
    """The batches that it had; where a collective holds it, the number of the batch, counted from 1."""
    sequences: dict[str, int]
    """By name of a process group, how many collectives the rank has begun in it."""
    stack: str = ""
    """Where a collective holds it."""


class LaunchInfo(NamedTuple):
    """The launching process, and the global ranks that it started on its machine, its own included."""

    pid: int
    ranks: Sequence[int]
    is_rank: bool = True
    """Whether the launching process is one of the ranks, the first one."""
    is_all: bool = True
    """Whether these are all ranks of the run. Not so where it has several machines."""


class ProcessIdentity(NamedTuple):
    """A process, and the machine on which its id means this process; None where that cannot be told."""

    pid: int
    machine: str | None
    host: str = ""
    """The name of the machine."""


@dataclass(frozen=True)
class Note(Generic[C]):
    """A place on the board, which stays empty or is written once; ``C`` is the type of what is written there.

    The content of most notes is an empty text: that the note is there says all.
    """

    content: ClassVar[Any] = str

    @property
    def name(self) -> str:
        """The name on the board, such as ``failed_1_0``."""
        return "_".join((type(self).__name__.lower(), *map(str, astuple(self))))

    def encode(self, content: C) -> str:
        """The text that stands for the content."""
        return content if isinstance(content, str) else json.dumps(cast(Any, content)._asdict())

    def decode(self, text: str) -> C:
        """The content that a text stands for."""
        return cast(C, text if self.content is str else self.content(**json.loads(text)))


@dataclass(frozen=True)
class _OfRank(Note[C]):
    """A note of one rank."""  # without a docstring, `dataclass` makes one, which takes time at each import

    rank: int


@dataclass(frozen=True)
class _OfFailure(Note[C]):
    """A note of one failure."""

    number: int


@dataclass(frozen=True)
class _OfBoth(_OfFailure[C]):
    """A note of one rank at one failure."""

    rank: int


@dataclass(frozen=True)
class _OfWrapping(Note[C]):
    """A note of one wrapping of a module."""

    engine: str
    generation: int


@dataclass(frozen=True)
class _OfMeeting(Note[C]):
    """A note of one meeting of the ranks."""

    meeting: int
    generation: int


@dataclass(frozen=True)
class _OfRankAtMeeting(_OfMeeting[C]):
    """A note of one rank at one meeting."""

    rank: int


class Launch(Note[LaunchInfo]):
    """A launcher has started these processes."""

    content = LaunchInfo


class Joined(_OfRank[str]):
    """The rank takes part: the others wait for it, and it stops when one of them fails."""


class Peer(_OfRank[ProcessIdentity]):
    """The process of the rank, for those on the same machine that look whether it is still there."""

    content = ProcessIdentity


class FirstFailure(_OfFailure[Failure]):
    """The failure of this number; the rank that wrote the note is the one that failed first."""

    content = Failure


class Failed(_OfBoth[str]):
    """The rank has failed too, and cleans up: it is not waited for in vain, and gets more time to end."""


class Place(_OfBoth[Whereabouts]):
    """Where the rank was when a collective failed."""

    content = Whereabouts


class Final(_OfFailure[str]):
    """A process ends because of the failure, so all others must."""


class Reporting(_OfFailure[str]):
    """A process prints the failure, so nobody else does."""


class Reported(_OfFailure[str]):
    """The failure has been printed."""


class Stopped(_OfBoth[str]):
    """The rank ends because another rank failed, and says so."""


class Ended(_OfRank[str]):
    """The rank has come to its end without an error."""


class Interrupted(_OfRank[str]):
    """The rank has seen a KeyboardInterrupt."""


class FinalInterrupt(Note[str]):
    """A KeyboardInterrupt has left the script of some rank."""


class Crash(_OfRank[str]):
    """Where the threads of the rank were when a signal such as SIGABRT or SIGSEGV ended it, as faulthandler writes."""


class LauncherDied(Note[str]):
    """The launching process is gone; the rank that wrote the note reports that, and takes the board away."""


class Over(Note[str]):
    """The process that hosts the board is about to end."""


class Released(_OfRank[str]):
    """The rank needs the board no longer."""


class Changed(_OfWrapping[str]):
    """A rank waits, before the forward pass of this number, for the others to wrap their module in DDP again."""


class Unchanged(_OfWrapping[str]):
    """The rank of this number began that forward pass without wrapping its module again."""


class Done(_OfRankAtMeeting[Progress]):
    """The rank has no batch left, and waits for the others."""

    content = Progress


class Held(_OfRankAtMeeting[Progress]):
    """The rank is in a collective of a batch, and a rank without a further batch does not take part."""

    content = Progress


class Blocked(_OfMeeting[str]):
    """Such a rank is there: those that wait raise an error."""
