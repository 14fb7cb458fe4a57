"""An action of one rank of each node, whose result or failure the others learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from treadle_fabric.coordination.hosts import patient_barrier
from treadle_fabric.coordination.objects import all_gather_objects
from treadle_fabric.coordination.on_rank_zero import Ranked, attempt

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
    acts = strategy.local_rank == 0
    result, error, trouble = attempt(action, strategy.global_rank, failure) if acts else (None, None, None)
    patient_barrier("what one rank of each node does for the others")
    outcomes = all_gather_objects(strategy, (strategy.local_rank, strategy.node_rank, result, trouble))
    if error is not None:
        raise error
    for _, _, _, told in outcomes:
        if told is not None:
            kind, text = told
            raise kind(text)
    of_node = (found for local, node, found, _ in outcomes if local == 0 and node == strategy.node_rank)
    return next(of_node, None)
