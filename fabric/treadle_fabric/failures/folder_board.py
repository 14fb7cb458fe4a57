"""The board of processes that a launcher started on one machine: a private folder, a file for each note."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from treadle_fabric.failures.board import Board
from treadle_fabric.failures.notes import Crash, Launch, LaunchInfo

__all__ = ["FolderBoard"]


class FolderBoard(Board):
    """A board in a folder.

    Args:
        directory: An existing folder.
        launch: Who launched, and which ranks.
    """

    def __init__(self, directory: str | os.PathLike[str], launch: LaunchInfo) -> None:
        super().__init__(launch.ranks)
        self.directory = Path(directory)
        self.launcher = launch.pid
        self.launcher_is_rank = launch.is_rank
        self.has_all_ranks = launch.is_all

    @classmethod
    def create(cls, ranks: Sequence[int], *, is_rank: bool = True, is_all: bool = True) -> FolderBoard:
        """A new board for these global ranks, which the calling process launches.

        Args:
            ranks: The ranks.
            is_rank: Whether the process is the first of them.
            is_all: Whether the run has no other ranks, on other machines.
        """
        launch = LaunchInfo(os.getpid(), tuple(ranks), is_rank, is_all)
        board = cls(tempfile.mkdtemp(prefix="treadle-launch-"), launch)
        board.post(Launch(), launch)
        return board

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> FolderBoard:
        """The board that a launching process created.

        Raises:
            FileNotFoundError: when the launch is over.
        """
        note = Launch()
        return cls(directory, note.decode((Path(directory) / note.name).read_text(encoding="utf-8")))

    def write(self, name: str, text: str) -> bool:
        # A link appears with its whole content or not at all, and only where no file of that name is. The file cannot
        # be written where the launch is over, because the folder is gone.
        with (
            contextlib.suppress(OSError),
            tempfile.NamedTemporaryFile("w", dir=self.directory, prefix=".draft-", encoding="utf-8") as draft,
        ):
            draft.write(text)
            draft.flush()
            os.link(draft.name, self.directory / name)
            return True
        return False

    def text(self, name: str) -> str | None:
        with contextlib.suppress(OSError):
            return (self.directory / name).read_text(encoding="utf-8")
        return None

    def crash_log(self, rank: int) -> TextIO | None:
        with contextlib.suppress(OSError):
            return open(self.directory / Crash(rank).name, "w", encoding="utf-8")
        return None

    def remove(self) -> None:
        gone = self.directory.with_name(f"{self.directory.name}-over")
        try:
            self.directory.rename(gone)  # or a note that is left meanwhile would keep the folder from being removed
        except OSError:
            gone = self.directory
        shutil.rmtree(gone, ignore_errors=True)
