"""The base of the callbacks that write checkpoints."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from treadle.callbacks.callback import Callback
from treadle_fabric import CheckpointError, describe_error, rank_zero_warn

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = ["Checkpoint", "await_others_at_the_end", "end_of_training", "has_trained", "tolerated"]


class Checkpoint(Callback):
    """Mark a callback as one that writes checkpoints: it runs last, and the trainer adds no ModelCheckpoint."""

    monitors: ClassVar[bool] = True
    call_order: ClassVar[int] = 1


def has_trained(trainer: Trainer) -> bool:
    """Tell whether a fit has come to its first batch: before that, the state is only what the fit began with."""
    training = trainer.state.fn == "fit" and trainer.state.stage is not None and trainer.fit_loop.began
    return training and (trainer.fit_progress.begun or trainer.fit_progress.batches > 0)


def await_others_at_the_end(trainer: Trainer) -> None:
    """Wait until an exception has ended training on every rank; raise where one still trains, and is ended for that.

    What a save sends must not meet what a rank still sends in its step.
    """
    trainer.strategy.barrier("a save after training has ended with an exception")


def end_of_training(exception: BaseException) -> str:
    """Return a sentence that says how an exception ended training."""
    if isinstance(exception, KeyboardInterrupt):
        return "Ctrl-C ended training."
    if isinstance(exception, SystemExit):
        return f"The program ended in training, with the exit status {exception.code}."
    return f"An error ended training: {describe_error(exception)}."


@contextmanager
def tolerated(trainer: Trainer, always: bool = False) -> Generator[None]:
    """Let a save fail on all ranks alike: with a warning or the end of the run, as ``on_save_error`` says.

    Args:
        trainer: the trainer with the ``on_save_error``.
        always: warn whatever ``on_save_error`` says.
    """
    try:
        yield
    except (CheckpointError, OSError) as error:
        if not always and getattr(trainer, "on_save_error", "raise") == "raise":
            raise
        rank_zero_warn(f"{error} The run goes on without this checkpoint; earlier checkpoints are untouched.")
