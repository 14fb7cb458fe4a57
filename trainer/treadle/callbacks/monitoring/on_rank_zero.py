"""Rank 0 acts, and every rank learns the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

from treadle_fabric import CheckpointError

if TYPE_CHECKING:
    from treadle_fabric import Strategy

__all__ = ["on_rank_zero"]

T = TypeVar("T")


def on_rank_zero(strategy: Strategy, action: Callable[[], T], failure: str) -> T:
    """Run ``action`` on rank 0, and return its result on every rank.

    Args:
        strategy: what the ranks communicate through. Every rank of it makes this call.
        action: what only rank 0 runs; its result is pickled.
        failure: what the error of the other ranks says that rank 0 did, such as ``"could not write 'a.ckpt'"``.

    Raises:
        Exception: on rank 0, what ``action`` raised.
        CheckpointError: on the other ranks, with the message of that error. So all ranks go on, or none.
    """
    if strategy.world_size == 1:
        return action()
    result: T | None = None
    error: Exception | None = None
    if strategy.is_global_zero:
        try:
            result = action()
        except Exception as e:
            error = e
    result, trouble = strategy.broadcast((result, None if error is None else str(error)))
    if trouble is not None:
        raise error or CheckpointError(f"Rank 0 {failure}: {trouble}")
    return cast("T", result)
