"""Connections between the first processes of the hosts, by which a host that is gone is missed.

When all processes of a host are killed, its kernel ends the connections. When the machine or its network is gone, the
other kernel does, after a silence. Nothing is ever sent but a greeting, so that a process that is busy is not missed.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from typing import Any, NamedTuple

from treadle_fabric.coordination import address_towards, end_when_silent, silence
from treadle_fabric.failures import notes
from treadle_fabric.failures.member import Member
from treadle_fabric.failures.report import claim_death
from treadle_fabric.failures.store_board import StoreBoard

__all__ = ["Lines"]

_DIAL_WAIT = 5.0  # seconds
_EXPLANATION_WAIT = 0.8  # seconds for somebody who knows more of the end of a line: a launcher, or a peer on the host
_LONGEST_GREETING = 100


class _End(NamedTuple):
    when: float
    silent: bool


class Lines:
    """The lines of this process: rank 0's to the first rank of each other host, or that rank's to rank 0.

    Args:
        member: This process's part.
        board: The board of all hosts.
        store: Where the ranks met.
        key: What the names in the store begin with.
        meeting: Address and port of the store.
    """

    def __init__(self, member: Member, board: StoreBoard, store: Any, key: str, meeting: tuple[str, int]) -> None:
        self._member = member
        self._board = board
        self._store = store
        self._key = f"{key}/line"
        self._meeting = meeting
        self._listener: socket.socket | None = None
        self._strangers: list[socket.socket] = []
        self._lines: dict[int, socket.socket] = {}
        self._ended: dict[int, _End] = {}
        self._token = secrets.token_hex(8)
        self._rank_zero: tuple[tuple[str, int], str] | None = None  # where it listens, and what it wants to hear
        self._dials = member.rank != 0
        self._closed = False
        if not self._dials:
            self._listen()

    def look(self) -> bool:
        """Look at all lines, and report the hosts that are gone; False once that is over."""
        if self._closed:
            return False
        if self._dials:
            self._dial()
        self._greet()
        for rank, line in list(self._lines.items()):
            if (silent := _has_ended(line)) is not None:
                self._lines.pop(rank).close()
                self._ended[rank] = _End(time.monotonic(), silent)
                self._dials = rank == 0
        for rank, end in list(self._ended.items()):
            if end.silent or time.monotonic() - end.when > _EXPLANATION_WAIT:
                del self._ended[rank]
                self._miss(rank, end.silent)
        return True

    def close(self) -> None:
        """End the lines: this process leaves the group."""
        self._closed = True
        for connection in (*self._lines.values(), *self._strangers, self._listener):
            if connection is not None:
                connection.close()

    def _listen(self) -> None:
        try:
            if socket.has_dualstack_ipv6():
                self._listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
            else:
                self._listener = socket.create_server(("", 0))
        except OSError:  # no line, then: a host that is gone is missed when a collective fails
            return
        self._listener.setblocking(False)
        port = self._listener.getsockname()[1]
        self._store.set(self._key, f"{port} {self._token} {address_towards(*self._meeting)}")

    def _greet(self) -> None:
        """Accept those that call, and hear which rank each is."""
        with contextlib.suppress(OSError):
            while self._listener is not None:
                line, _ = self._listener.accept()
                line.setblocking(False)
                self._strangers.append(line)
        for line in list(self._strangers):
            try:
                greeting = line.recv(_LONGEST_GREETING).decode(errors="replace").split()
            except BlockingIOError:
                continue
            except OSError:
                greeting = []
            self._strangers.remove(line)
            if len(greeting) == 2 and greeting[0] == self._token and greeting[1].isdecimal():
                end_when_silent(line)
                self._lines[int(greeting[1])] = line
                self._ended.pop(int(greeting[1]), None)
            else:
                line.close()

    def _dial(self) -> None:
        """Call rank 0, once it has said where it listens."""
        try:
            if self._rank_zero is None and self._store.check([self._key]):
                port, token, *address = self._store.get(self._key).decode().split()
                self._rank_zero = (address[0] if address else self._meeting[0], int(port)), token
        except RuntimeError:  # the store is gone, and the board says so
            self._dials = False
        if self._rank_zero is None:
            return
        self._dials = False
        place, token = self._rank_zero
        with contextlib.suppress(OSError):
            line = socket.create_connection(place, _DIAL_WAIT)
            line.sendall(f"{token} {self._member.rank}\n".encode())
            line.setblocking(False)
            end_when_silent(line)
            self._lines[0] = line
            self._ended.pop(0, None)

    def _miss(self, rank: int, silent: bool) -> None:
        """Report a rank whose line has ended, with its host, unless it left or its end has been explained."""
        board = self._board
        if board.has(notes.Released(rank)) or board.has(notes.Over()) or board.final_failure() is not None:
            return
        how = (
            f"nothing has come from it for {silence():g} s: the machine is down, or the network between"
            if silent
            else "its processes ended without a word"
        )
        sentence = f"{board.describe_host(rank)} is lost: {how}\n"
        if board.exists():
            claim_death(self._member.board, rank, sentence, self._member.process, board.hosts.get(rank, ""))
        else:
            board.note_loss(rank, sentence)


def _has_ended(line: socket.socket) -> bool | None:
    """None while the line is there; then whether it ended in silence, and not by a word of the other kernel's."""
    try:
        line.recv(_LONGEST_GREETING)
    except BlockingIOError:
        return None
    except ConnectionError:
        return False
    except OSError:
        return True
    return False
