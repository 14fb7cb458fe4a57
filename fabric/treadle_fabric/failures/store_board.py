"""The board of processes that something else started, on one or several machines: the store at which they met."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from treadle_fabric.coordination import end_connections_when_silent, list_ranks, silence
from treadle_fabric.failures import notes
from treadle_fabric.failures.board import Board
from treadle_fabric.failures.notes import Failure

__all__ = ["StoreBoard", "is_hosted_by_a_rank"]

_PATIENCE = timedelta(seconds=5)  # with a store that does not answer
_OF_PRINTING = tuple(f"{note.__name__.lower()}_" for note in (notes.Reporting, notes.Reported))


class StoreBoard(Board):
    """Notes in the rendezvous store, through a connection of this board's own.

    Where a rank hosts the store and the store goes without notice, that rank has died, or its machine is gone: a
    failure, which each of the other ranks then notes for itself.

    Args:
        store: Where the ranks meet.
        key: What the names of the notes begin with.
        rank: Global rank of this process.
        world_size: The number of ranks.
        collects_output: Whether the user sees what all hosts print in one place, so that one of them prints a failure.
    """

    has_launcher = False

    def __init__(self, store: Any, key: str, rank: int, world_size: int, collects_output: bool = True) -> None:
        super().__init__(range(world_size))
        self._origin = store  # where this process hosts the store, the store goes with the last reference
        self._connect(store)
        self._key = key
        self._rank = rank
        self._place = "" if collects_output else f"@{socket.gethostname()}"
        self._hosted_by_a_rank = is_hosted_by_a_rank()
        self.goes_with_process = rank == 0 and self._hosted_by_a_rank
        self._count = itertools.count()
        self._lock = threading.Lock()
        self._seen: dict[str, str] = {}  # notes do not change, and are there still when the store is not
        self._removed = False
        self._lost = False
        self.hosts: dict[int, str] = {}
        """The hosts of the ranks that are known."""

    def exists(self) -> bool:
        """False once notes can neither be left nor read."""
        return not (self._removed or self._lost)

    def write(self, name: str, text: str) -> bool:
        written = f"{self._rank}.{next(self._count)} {text}"  # so that equal texts differ
        found = self._ask(lambda: self._store.compare_set(self._key_of(name), "", written).decode())
        if found is None and not self._lost:
            return False
        return self._seen.setdefault(name, found or written) == written

    def text(self, name: str) -> str | None:
        if self._removed:
            return None
        key = self._key_of(name)
        found = self._seen.get(name)
        if found is None and self._ask(lambda: self._store.check([key])):
            found = self._ask(lambda: self._store.get(key).decode())
            if found is not None:
                found = self._seen.setdefault(name, found)
        return None if found is None else found.partition(" ")[2]

    def remove(self) -> None:
        self._removed = True

    def _key_of(self, name: str) -> str:
        return f"{self._key}/{name}{self._place if name.startswith(_OF_PRINTING) else ''}"

    def _connect(self, store: Any) -> None:
        self._store: Any = store.clone()
        self._store.set_timeout(_PATIENCE)
        if (port := _port_of(store)) is not None:
            end_connections_when_silent(port)

    def _ask(self, question: Callable[[], Any]) -> Any:
        with self._lock:
            for again in (False, True):
                if not self.exists():
                    return None
                try:
                    if again:
                        self._connect(self._store)
                    return question()
                except dist.DistNetworkError as error:
                    silent = "timed out" in str(error).lower()
                    break
                except RuntimeError:  # the store did not answer in time
                    continue
            else:
                return None
            self._removed = self.goes_with_process or (self._hosted_by_a_rank and notes.Over().name in self._seen)
            self._lost = not self._removed
        if self._lost and self._hosted_by_a_rank:
            how = f"does not answer for {silence():g} s" if silent else "died and left no traceback"
            sentence = f"rank 0, which held the rendezvous store, {how}\n"
            elsewhere = self.hosts.get(0, "") not in ("", socket.gethostname())
            self.note_loss(0, f"{self.describe_host(0)} is lost: {sentence}" if elsewhere else sentence)
        return None

    def describe_host(self, rank: int) -> str:
        """The host of a rank, with all its ranks that are known."""
        host = self.hosts.get(rank, "")
        ranks = [other for other, name in self.hosts.items() if name == host] if host else [rank]
        return f"host {host} with {list_ranks(ranks)}" if host else list_ranks(ranks)

    def note_loss(self, rank: int, sentence: str) -> None:
        """Note that a rank is lost, and the store with it, unless a final failure explains that.

        Args:
            rank: The rank.
            sentence: What is known of its end.
        """
        self._lost = True  # nobody else sees what is written from here on
        newest = self.newest()
        if not self.has(notes.Final(newest)):
            self.claim(Failure(newest + 1, rank, sentence, host=self.hosts.get(rank, "")))
            self.post(notes.Final(newest + 1))


def is_hosted_by_a_rank() -> bool:
    """Whether rank 0 hosts the store of the run, and not torchrun's agent."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _port_of(store: Any) -> int | None:
    """The port of the server behind a store; None where no server is."""
    while isinstance(store, dist.PrefixStore):  # type: ignore[attr-defined]
        store = store.underlying_store
    return int(store.port) if isinstance(store, dist.TCPStore) else None  # type: ignore[attr-defined]
