"""The interface of everything that stores checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from treadle_fabric.types import PathLike

__all__ = ["CheckpointIO"]


class CheckpointIO(ABC):
    """Stores checkpoints under paths, and reads them back."""

    sharded: ClassVar[bool] = False
    """Whether every rank calls :meth:`save_checkpoint`, with its part, and raises if any rank failed; else rank 0 does.

    Where every rank calls, values of :class:`PerRank` are in the state as they are, and each rank stores its own. Where
    rank 0 calls, the list of the values of all ranks has taken the place of each.
    """

    @abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``, whole or not at all.

        Raises:
            CheckpointError: Nothing was written; what was at ``path`` before is still there.
        """

    @abstractmethod
    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint at ``path``.

        Raises:
            CheckpointError: It cannot be read; the subclasses say why.
        """

    @abstractmethod
    def remove_checkpoint(self, path: PathLike) -> None:
        """Delete the checkpoint at ``path``; nothing happens if there is none."""

    @property
    def after_saves(self) -> Callable[[Callable[[], None]], None] | None:
        """A function that calls what it is given once all saves so far have ended well.

        None: a save has ended when its call returns.
        """
        return None

    def wait(self) -> None:
        """Wait until all saves so far have ended. Default: return at once, because a save ends with its call.

        Raises:
            CheckpointError: A save failed, and that was not raised before.
        """

    def teardown(self) -> None:
        """Called when the run is over. A store that works in the background finishes, and raises as :meth:`wait`."""
