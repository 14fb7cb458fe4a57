"""The board of processes that a launcher started on one of several hosts: the host's folder, linked to a store."""

from __future__ import annotations

from typing import TextIO

from treadle_fabric.failures import notes
from treadle_fabric.failures.board import Board
from treadle_fabric.failures.folder_board import FolderBoard
from treadle_fabric.failures.store_board import StoreBoard

__all__ = ["LinkedBoard"]

# What concerns the launch of one host: each host prints a failure once, and passes its own interrupt on.
_OF_THE_HOST = tuple(
    f"{note.__name__.lower()}"
    for note in (
        notes.Crash,
        notes.FinalInterrupt,
        notes.Interrupted,
        notes.Launch,
        notes.LauncherDied,
        notes.Reported,
        notes.Reporting,
        notes.Stopped,
    )
)


class LinkedBoard(Board):
    """A folder for the notes of one host, and, from the time the ranks of all hosts have met, a store beside it.

    The store decides who came first. What it has is copied into the folder when a rank of this host looks for it, so
    that the host's launcher sees it, and what the launcher left in the folder is copied into the store. A launcher that
    is no rank knows the folder only.

    Args:
        folder: The board of the launch on this host.
    """

    spans_hosts = True

    def __init__(self, folder: FolderBoard) -> None:
        super().__init__(folder.ranks)
        self.folder = folder
        self.launcher_is_rank = folder.launcher_is_rank
        self._store: StoreBoard | None = None
        self._in_both: set[str] = set()

    @property
    def store(self) -> StoreBoard | None:
        """The board of all hosts; None where their ranks have not met, or have parted."""
        return self._store

    def link(self, store: StoreBoard) -> None:
        """Share the notes with the other hosts from now on."""
        self.ranks = store.ranks
        self.goes_with_process = store.goes_with_process
        self._in_both = set()
        self._store = store

    def unlink(self) -> None:
        """Share them no longer."""
        store, self._store = self._store, None
        self.ranks, self.goes_with_process = self.folder.ranks, False
        if store is not None:
            store.remove()

    def write(self, name: str, text: str) -> bool:
        store = self._store
        if store is None or not _is_for_all(name):
            return self.folder.write(name, text)
        wrote = store.write(name, text)
        found = store.text(name)
        if found is None:  # the store is gone
            return self.folder.write(name, text)
        self.folder.write(name, found)
        return wrote

    def text(self, name: str) -> str | None:
        found, store = self.folder.text(name), self._store
        if store is None or name in self._in_both or not _is_for_all(name):
            return found
        shared = store.text(name)
        if shared is None and found is not None and store.write(name, found):
            shared = found
        if shared is None:
            return found
        if found is None:
            self.folder.write(name, shared)
        self._in_both.add(name)
        return shared if found is None else found

    def crash_log(self, rank: int) -> TextIO | None:
        return self.folder.crash_log(rank)

    def remove(self) -> None:
        self.unlink()
        self.folder.remove()


def _is_for_all(name: str) -> bool:
    return name.partition("_")[0] not in _OF_THE_HOST
