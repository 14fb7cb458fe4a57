"""A process that waits for others says for whom: after ten seconds, and then more and more rarely."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

__all__ = ["WaitMessages", "list_ranks", "messages_during", "wait_with_messages"]

# Seconds after which the first message is due; the others come in a fixed proportion to it.
_FIRST_VARIABLE = "TREADLE_WAIT_MESSAGE_AFTER"
_FIRST = 10.0
_LATER = (1, 3, 6, 12, 30)  # times the first: 10 s, 30 s, 1 min, 2 min, 5 min, and then every 5 min
_SHOWN = 8  # ranks, or ranges of ranks
_SHORTEST_LOOK, _LONGEST_LOOK = 0.005, 0.2


def _say(text: str) -> None:
    with contextlib.suppress(Exception):
        sys.stderr.write(f"{text}\n")  # in one write, so that lines of several processes do not mix
        sys.stderr.flush()


class WaitMessages:
    """Tells the user of a wait that has taken long.

    Args:
        describe: Makes the message from the seconds so far; empty where there is nothing to say.
        now: The clock, in seconds; tests give one of their own.
        say: Prints. Default: on stderr.
    """

    def __init__(
        self,
        describe: Callable[[float], str],
        now: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = _say,
    ) -> None:
        self._describe = describe
        self._now = now
        self._say = say
        self._start = now()
        self._said = 0
        try:
            self._first = float(os.environ.get(_FIRST_VARIABLE, _FIRST))
        except ValueError:
            self._first = _FIRST

    @property
    def seconds(self) -> float:
        """For how long this process has waited."""
        return self._now() - self._start

    def look(self) -> None:
        """Say what is waited for, if a message is due; to be called again and again."""
        seconds = self.seconds
        if seconds < self._due():
            return
        while seconds >= self._due():  # where a look was late, one message stands for all that were due
            self._said += 1
        if text := self._describe(seconds):
            self._say(text)

    def _due(self) -> float:
        last = len(_LATER) - 1
        return self._first * (_LATER[min(self._said, last)] + _LATER[-1] * max(0, self._said - last))


def wait_with_messages(
    met: Callable[[], bool], describe: Callable[[float], str], timeout: float, look_every: float = _LONGEST_LOOK
) -> bool:
    """Wait until a condition holds, and say what for; returns False where the time was over before.

    Args:
        met: The condition.
        describe: Makes the message from the seconds so far.
        timeout: Seconds.
        look_every: Seconds between two looks in the long run; the first ones are quick.
    """
    messages, pause = WaitMessages(describe), _SHORTEST_LOOK
    while not met():
        if messages.seconds >= timeout:
            return False
        messages.look()
        time.sleep(min(pause, max(0.0, timeout - messages.seconds)))
        pause = min(2 * pause, look_every)
    return True


@contextlib.contextmanager
def messages_during(describe: Callable[[float], str]) -> Iterator[None]:
    """Say what is waited for while the context holds a call that blocks and releases the interpreter's lock.

    Args:
        describe: Makes the message from the seconds so far; another thread calls this.
    """
    messages, over = WaitMessages(describe), threading.Event()

    def look() -> None:
        while not over.wait(_LONGEST_LOOK):
            messages.look()

    thread = threading.Thread(target=look, name="treadle-waits", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def list_ranks(ranks: Iterable[int]) -> str:
    """Return ranks for a sentence: ``rank 3``, or ``ranks 1, 3-7``; of many only the first ones, and how many more."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:_SHOWN])
    if more := sum(map(len, runs[_SHOWN:])):
        text += f" and {more} more"
    return f"rank {text}" if len(runs) == 1 and len(runs[0]) == 1 else f"ranks {text}"
