"""The interface of everything that stores checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from treadle_fabric.checkpoint.host.arena import Arena
from treadle_fabric.types import PathLike

__all__ = ["CheckpointIO", "SharedSave", "SharedSaves"]


class SharedSave(Protocol):
    """A save of all ranks that has begun: who writes what is decided, and each rank has copied its part."""

    def write(self, group: Any) -> None:
        """Write the part of this rank, in any thread; every rank calls this.

        Args:
            group: A :class:`HostGroup` of this thread's own, through which the ranks talk meanwhile.

        Raises:
            CheckpointError: A rank failed, and all raise.
        """


class SharedSaves(Protocol):
    """Begins saves of all ranks."""

    def __call__(
        self,
        checkpoint: dict[str, Any],
        path: PathLike,
        storage_options: Any | None,
        /,
        *,
        before: Callable[[], None],
        arena: Arena,
    ) -> SharedSave:
        """Decide who writes what, and copy this rank's part; every rank calls this.

        Args:
            checkpoint: As for :meth:`CheckpointIO.save_checkpoint`.
            path: The same.
            storage_options: The same.
            before: What comes first, on every rank; where it fails, all ranks raise that.
            arena: The memory to copy to.

        Raises:
            CheckpointError: A rank failed, and all raise.
        """


class CheckpointIO(ABC):
    """Stores checkpoints under paths, and reads them back."""

    @property
    def sharded(self) -> bool:
        """Whether every rank calls :meth:`save_checkpoint`, with its part, and raises if any rank failed; else rank 0.

        Where every rank calls, values of :class:`PerRank` are in the state as they are, and each rank stores its own.
        Where rank 0 calls, the list of the values of all ranks has taken the place of each. A class may as well have
        an attribute of this name. Default: False.
        """
        return False

    @property
    def shared_saves(self) -> SharedSaves | None:
        """Where every rank calls: what begins a save that is written later. None: it cannot be written later."""
        return None

    @property
    def path_is_all(self) -> bool:
        """Whether a save writes what lies at its path, and nothing else: then a link to it is a second checkpoint.

        A class may as well have an attribute of this name. Default: False.
        """
        return False

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
