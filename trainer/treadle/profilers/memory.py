"""Which allocations of a CUDA device came from which lines of code."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

import torch

from treadle_fabric import MisconfigurationException, PathLike, check_integer, rank_zero_only, warn_user

__all__ = ["MemorySnapshot"]


class MemorySnapshot:
    """Records the allocations on CUDA devices, and writes them to files: on demand, and when memory runs out.

    ::

        with MemorySnapshot("snapshots") as memory:
            trainer.fit(model)  # an OutOfMemoryError writes snapshots/memory-out-of-memory.pickle
            memory.dump()  # snapshots/memory-1.pickle; a callback may call it, too

    The files open at https://pytorch.org/memory_viz. In a run of several processes each one has its own files, with its
    rank in their names.

    Args:
        dirpath: The folder of the files. Default: the working directory.
        filename: The first part of their names. Default: "memory".
        max_entries: The allocations that are kept, the newest ones. Default: 100,000.

    Raises:
        MisconfigurationException: ``max_entries`` is no positive integer.
    """

    def __init__(self, dirpath: PathLike = ".", filename: str = "memory", max_entries: int = 100_000) -> None:
        self.dirpath, self.filename = os.fspath(dirpath), filename
        self.max_entries = check_integer("max_entries", max_entries, minimum=1)
        self.recording = False
        """Whether allocations are recorded now."""
        self._count = 0

    def start(self) -> None:
        """Begin to record.

        Raises:
            MisconfigurationException: There is no CUDA device.
        """
        if not torch.cuda.is_available():
            raise MisconfigurationException(
                "MemorySnapshot records the memory of CUDA devices, and torch finds none: leave it out on this machine."
            )
        torch.cuda.memory._record_memory_history(max_entries=self.max_entries)
        self.recording = True

    def stop(self) -> None:
        """Record no more; what was recorded is dropped."""
        if self.recording:
            torch.cuda.memory._record_memory_history(enabled=None)
            self.recording = False

    def dump(self, part: str | None = None) -> str:
        """Write the allocations so far into a file.

        Args:
            part: The last part of the file's name. Default: the number of the dump.

        Returns:
            The path of the file.

        Raises:
            MisconfigurationException: Nothing is recorded now.
        """
        if not self.recording:
            raise MisconfigurationException(
                "MemorySnapshot.dump: nothing is recorded; enter the snapshot, or call start."
            )
        self._count += 1
        rank = getattr(rank_zero_only, "rank", None) if torch.distributed.is_initialized() else None
        parts = (self.filename, part or str(self._count), None if rank is None else str(rank))
        path = os.path.join(self.dirpath, "-".join(each for each in parts if each) + ".pickle")
        os.makedirs(self.dirpath, exist_ok=True)
        torch.cuda.memory._dump_snapshot(path)  # type: ignore[no-untyped-call]
        return path

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, torch.OutOfMemoryError):
                try:
                    warn_user(f"Out of memory: what was allocated is in {self.dump('out-of-memory')}.")
                except OSError as second:  # the first error is the one to report
                    warn_user(f"Out of memory, and the snapshot could not be written: {second!r}.")
        finally:
            self.stop()
