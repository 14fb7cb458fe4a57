"""An action of rank 0 alone, whose result or failure all ranks learn; and whether the ranks have the same value."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from treadle_fabric.coordination.hosts import host_group, wait_for_rank_zero
from treadle_fabric.errors import CheckpointError, TreadleError, describe_error

__all__ = ["Ranked", "Trouble", "attempt", "first_different", "on_rank_zero"]

T = TypeVar("T")


class Ranked(Protocol):
    """A strategy or a Fabric, as far as ranks talk through one here."""

    @property
    def world_size(self) -> int: ...

    @property
    def global_rank(self) -> int: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any: ...


def on_rank_zero(strategy: Ranked, action: Callable[[], T], failure: str) -> T:
    """Run an action on rank 0, and give its result to all ranks; every rank calls this.

    The action may take longer than the timeout of collectives.

    Args:
        strategy: A strategy or a Fabric: whose ranks.
        action: What rank 0 does. What it returns must be something that can be pickled.
        failure: What rank 0 failed to do, for the message on the other ranks: "could not write 'a.ckpt'".

    Returns:
        On every rank what ``action`` returned on rank 0.

    Raises:
        Exception: On rank 0, what ``action`` raised.
        CheckpointError: On the other ranks, if ``action`` raised a CheckpointError (of its class) or an OSError.
        TreadleError: On the other ranks, if ``action`` raised any other exception.
    """
    if strategy.world_size == 1:
        return action()
    result, error, trouble = attempt(action, 0, failure) if strategy.global_rank == 0 else (None, None, None)
    wait_for_rank_zero()
    result, trouble = strategy.broadcast((result, trouble))
    if error is not None:
        raise error
    if trouble is not None:
        kind, text = trouble
        raise kind(text)
    return result  # type: ignore[no-any-return]


Trouble = tuple[type[TreadleError], str]
"""Class and text of the error that the ranks raise which did not act."""


def attempt(action: Callable[[], T], rank: int, failure: str) -> tuple[T, None, None] | tuple[None, Exception, Trouble]:
    """Return the result of an action; or what it raised, and what the other ranks are to raise."""
    try:
        return action(), None, None
    except Exception as e:
        return None, e, (_kind_elsewhere(e), f"Rank {rank} {failure}: {str(e) or describe_error(e)}")


def _kind_elsewhere(error: Exception) -> type[TreadleError]:
    """The class of what the other ranks raise: only classes of this library are sure to be made from a text."""
    if isinstance(error, CheckpointError) and type(error).__module__ == CheckpointError.__module__:
        return type(error)
    return CheckpointError if isinstance(error, CheckpointError | OSError) else TreadleError


def first_different(strategy: Ranked, value: object) -> int | None:
    """Find the first rank whose value is another one than rank 0's; every rank calls this.

    Args:
        strategy: A strategy or a Fabric: whose ranks.
        value: Numbers, strings and None, in tuples or dicts: what has the same ``repr`` wherever it is equal.

    Returns:
        On every rank the number of that rank; None where all ranks have the same value.
    """
    if strategy.world_size == 1:
        return None
    host, mark = host_group(), zlib.crc32(repr(value).encode())
    highest, lowest = host.largest([mark, -mark])
    if highest == -lowest:
        return None
    differs = strategy.broadcast(mark) != mark
    return -host.largest([-strategy.global_rank if differs else -strategy.world_size])[0]
