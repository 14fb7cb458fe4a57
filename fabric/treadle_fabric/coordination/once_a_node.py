"""An action of one rank of each node, whose result or failure the others learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from treadle_fabric.coordination.hosts import meet_patiently
from treadle_fabric.coordination.objects import all_gather_objects
from treadle_fabric.coordination.on_rank_zero import Ranked
from treadle_fabric.errors import CheckpointError, TreadleError, describe_error

__all__ = ["OnNodes", "once_a_node"]

T = TypeVar("T")


class OnNodes(Ranked, Protocol):
    """A strategy or a Fabric, as far as the ranks of its nodes are concerned here."""

    @property
    def local_rank(self) -> int: ...

    @property
    def node_rank(self) -> int: ...


def once_a_node(strategy: OnNodes, action: Callable[[], T], failure: str) -> T | None:
    """Run an action on the first rank of each node, and give its result to that node's ranks; every rank calls this.

    The action may take longer than the timeout of collectives.

    Args:
        strategy: A strategy or a Fabric: whose ranks.
        action: What the rank does. What it returns must be small, and something that can be pickled.
        failure: What the rank failed to do, for the message on the other ranks: "could not read 'a.ckpt'".

    Returns:
        What ``action`` returned on the first rank of this node; None if no rank of it is the first.

    Raises:
        Exception: On a rank that acted, what ``action`` raised.
        TreadleError: On the other ranks of all nodes, if ``action`` failed on any; a CheckpointError for an error that
            is one, of its class, and for an OSError.
    """
    result, error, trouble = None, None, None
    if strategy.local_rank == 0:
        try:
            result = action()
        except Exception as e:
            text = f"Rank {strategy.global_rank} {failure}: {str(e) or describe_error(e)}"
            error, trouble = e, (_kind_elsewhere(e), text)
    meet_patiently("what one rank of each node does for the others")
    outcomes = all_gather_objects(strategy, (strategy.local_rank, strategy.node_rank, result, trouble))
    if error is not None:
        raise error
    for _, _, _, told in outcomes:
        if told is not None:
            kind, text = told
            raise kind(text)
    of_node = (found for local, node, found, _ in outcomes if local == 0 and node == strategy.node_rank)
    return next(of_node, None)


def _kind_elsewhere(error: Exception) -> type[TreadleError]:
    """The class of what the other ranks raise: only classes of this library are sure to be made from a text."""
    if isinstance(error, CheckpointError) and type(error).__module__ == CheckpointError.__module__:
        return type(error)
    return CheckpointError if isinstance(error, CheckpointError | OSError) else TreadleError
