"""What every way of storing a checkpoint offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from treadle_fabric.types import PathLike

__all__ = ["CheckpointIO"]


class CheckpointIO(ABC):
    """Stores a checkpoint under a path, and gets it back."""

    sharded: ClassVar[bool] = False
    """Every rank calls :meth:`save_checkpoint`, with its part, and all learn whether all could; else rank 0 does.

    Values that are marked as :class:`PerRank` come to such a store as they are; to others as the list of all ranks'.
    """

    @abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``, whole or not at all.

        Raises:
            CheckpointError: Nothing was written; what lay at ``path`` before is still there.
        """

    @abstractmethod
    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint at ``path``.

        Raises:
            CheckpointError: See its subclasses for what can be wrong.
        """

    @abstractmethod
    def remove_checkpoint(self, path: PathLike) -> None:
        """Delete the checkpoint at ``path``; nothing happens if there is none."""

    @property
    def after_saves(self) -> Callable[[Callable[[], None]], None] | None:
        """Runs a function once all saves so far have ended well; None where a save has ended when its call returns."""
        return None

    def wait(self) -> None:
        """Return when all saves so far have ended; where they end with their call, there is nothing to wait for.

        Raises:
            CheckpointError: One of them failed, and nobody was told yet.
        """

    def teardown(self) -> None:
        """The run is over. A store that works in the background finishes here, and raises as :meth:`wait` does."""
