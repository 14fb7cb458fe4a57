"""The base of the callbacks that write checkpoints."""

from __future__ import annotations

from typing import ClassVar

from treadle.callbacks.callback import Callback

__all__ = ["Checkpoint"]


class Checkpoint(Callback):
    """Marks a callback as one that writes checkpoints: it runs last, and the trainer adds none of its own."""

    monitors: ClassVar[bool] = True
    call_order: ClassVar[int] = 1
