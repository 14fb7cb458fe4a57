"""What a search has found in a run: a run that is resumed takes it, and does not search again."""

from __future__ import annotations

from typing import Any

__all__ = ["Found"]


class Found:
    """The last value that a callback's search has found, and when.

    Attributes:
        value: What was found; None before that.
        epoch: The epoch in which it was found.
    """

    def __init__(self) -> None:
        self.value: Any = None
        self.epoch = -1
        self._resumed = False

    def note(self, value: Any, epoch: int) -> None:
        """Note what was found."""
        self.value, self.epoch, self._resumed = value, epoch, False

    def is_taken(self, epoch: int) -> bool:
        """Whether the run was resumed after the search of this epoch, so that nothing is to be searched."""
        return self._resumed and epoch <= self.epoch

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"value": self.value, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what a checkpoint has kept."""
        self.value, self.epoch = state["value"], state["epoch"]
        self._resumed = self.value is not None
