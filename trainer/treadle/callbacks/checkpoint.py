"""The base of the callbacks that write checkpoints."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from treadle.callbacks.callback import Callback
from treadle_fabric.errors import CheckpointError
from treadle_fabric.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = ["Checkpoint", "tolerated"]


class Checkpoint(Callback):
    """Marks a callback as one that writes checkpoints: it runs last, and the trainer adds none of its own."""

    monitors: ClassVar[bool] = True
    call_order: ClassVar[int] = 1


@contextmanager
def tolerated(trainer: Trainer, always: bool = False) -> Generator[None]:
    """A save that may fail inside, on all ranks alike: a warning or the end of the run, as ``on_save_error`` says.

    Args:
        trainer: whose ``on_save_error`` it is.
        always: warn in any case.
    """
    try:
        yield
    except (CheckpointError, OSError) as error:
        if not always and getattr(trainer, "on_save_error", "raise") == "raise":
            raise
        rank_zero_warn(f"{error} The run goes on without this checkpoint; earlier ones stand.")
