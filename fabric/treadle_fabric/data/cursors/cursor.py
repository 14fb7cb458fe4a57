"""What every cursor can do: iterate the epochs of a training loader, each from any position on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, ClassVar, final

__all__ = ["Cursor"]


class Cursor(ABC):
    """Iterates a loader from a position, with the random numbers that it would have had there.

    A resumed epoch is continued by the next iteration, unless :meth:`finish` or :meth:`leave` is called before.
    """

    skips_by_index: ClassVar[bool] = False
    """Whether going to a position loads nothing, and an iteration leaves nothing in the loader but its generators."""
    restores_loader: ClassVar[bool] = False
    """Whether the loader's own state says where an epoch ends, so that it need not be iterated to its end."""
    ends_without_drawing: bool = False
    """Whether nothing happens at an epoch's end: no sampler draws once more, and no worker has to be told."""

    def __init__(self) -> None:
        self._resumed: dict[str, Any] = {}
        self._ahead = False

    @property
    @abstractmethod
    def drawn_from(self) -> int | dict[str, Any]:
        """What the order of this epoch was drawn from: a seed, or random states."""

    @abstractmethod
    def take_generators(self, state: dict[str, Any], *, within: bool) -> None:
        """Give the user's generators the state that they had at the begin of the epoch, or (not ``within``) later.

        Args:
            state: Returned by :meth:`state_dict`.
            within: True: their state when the epoch began. False: their state when the checkpoint was saved.
        """

    def close(self) -> None:
        """End the workers that this cursor started and that persist between epochs."""

    @final
    def iterate(self, epoch: int, skip: int = 0, *, ahead: bool = False) -> Iterator[Any]:
        """The batches of an epoch.

        Args:
            epoch: The number of the epoch.
            skip: The number of batches to leave out at the beginning.
            ahead: Whether each batch is asked for before training comes to it, while the one before it is trained on.
        """
        resumed, self._resumed = self._resumed, {}
        self._ahead = ahead
        return self._iterate(epoch, skip, resumed)

    @final
    def state_dict(self, position: int) -> dict[str, Any]:
        """What a position in this epoch means: the random states that its order was drawn from.

        Args:
            position: The number of batches of the epoch that are done.
        """
        return self._resumed or self._state(position)

    @final
    def load_state_dict(self, state: dict[str, Any], *, within: bool = True, whole: bool = True) -> None:
        """The next iteration continues the epoch of ``state``, or begins the epoch after it.

        Args:
            state: Returned by :meth:`state_dict`.
            within: True: continue the epoch. False: begin the one after it.
            whole: Whether an epoch is the whole loader, and is not cut short by a limit.

        Raises:
            CheckpointMismatchError: The state is that of another number of loaders.
        """
        self._check(state)
        self._resumed = state if within else {}
        if not within:
            self._follow(state, ended=whole, whole=whole)

    @final
    def finish(self, epoch: int, skip: int, *, drain: bool, whole: bool) -> None:
        """End a resumed epoch that has no batch left: samplers draw what they draw at the end of an epoch.

        Args:
            epoch: The number of the epoch.
            skip: The number of its batches.
            drain: Whether an iteration would have asked for one more batch, in vain.
            whole: As in :meth:`load_state_dict`.
        """
        if self._resumed and drain and not self.restores_loader:
            with suppress(Exception):  # as of an epoch that was not resumed: nobody needs the batch
                next(self.iterate(epoch, skip), None)
        elif self._resumed:
            self._follow(self._resumed, ended=False, whole=whole)
        self._resumed = {}

    @final
    def leave(self) -> None:
        """Begin the epoch after the resumed one, although that has batches left."""
        if self._resumed:
            self.load_state_dict(self._resumed, within=False)

    @abstractmethod
    def _iterate(self, epoch: int, skip: int, resumed: dict[str, Any]) -> Iterator[Any]:
        """:meth:`iterate`, in the order of the epoch of ``resumed`` where that is not empty."""

    @abstractmethod
    def _state(self, position: int) -> dict[str, Any]:
        """:meth:`state_dict` of an epoch that was iterated here."""

    @abstractmethod
    def _check(self, state: dict[str, Any]) -> None:
        """Refuse the state of another number of loaders."""

    @abstractmethod
    def _follow(self, state: dict[str, Any], *, ended: bool, whole: bool) -> None:
        """The next epoch is the one after that of ``state``.

        Args:
            state: Returned by :meth:`state_dict`.
            ended: Whether the loader itself had come to the end of the epoch when its state was saved.
            whole: As in :meth:`load_state_dict`.
        """
