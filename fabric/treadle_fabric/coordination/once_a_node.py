"""An action of one rank of each node, or of every rank, whose result or failure the others learn."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from treadle_fabric.coordination.hosts import patient_barrier
from treadle_fabric.coordination.objects import all_gather_objects
from treadle_fabric.coordination.on_rank_zero import Ranked, Trouble, attempt
from treadle_fabric.errors import CheckpointNotFoundError

__all__ = ["OnNodes", "on_every_rank", "once_a_node"]

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
    outcomes = _outcomes(strategy, action, strategy.local_rank == 0, failure)
    of_node = (found for local, node, found in outcomes if local == 0 and node == strategy.node_rank)
    return next(of_node, None)


def on_every_rank(strategy: OnNodes, action: Callable[[], T], failure: str) -> list[T]:
    """Run an action on every rank, and give the results to all; every rank calls this.

    Args:
        strategy: As for :func:`once_a_node`, and so is all else.
        action: What each rank does.
        failure: What the rank failed to do.

    Returns:
        What ``action`` returned on each rank, in the order of ranks.

    Raises:
        Exception: As :func:`once_a_node`, if ``action`` failed on any rank.
    """
    outcomes: list[Any] = _outcomes(strategy, action, True, failure)
    return [found for _, _, found in outcomes]


def _outcomes(strategy: OnNodes, action: Callable[[], T], acts: bool, failure: str) -> list[tuple[int, int, T | None]]:
    """Of each rank its place on its node, its node, and what it did; or raise."""
    result, error, trouble = attempt(action, strategy.global_rank, failure) if acts else (None, None, None)
    patient_barrier("what one rank of each node does for the others")
    mine = (strategy.local_rank, strategy.node_rank, result, trouble, socket.gethostname() if acts else "")
    outcomes = all_gather_objects(strategy, mine)
    hint = _disk_hint([(host, told) for _, _, _, told, host in outcomes if host])
    if isinstance(error, CheckpointNotFoundError) and hint:
        raise CheckpointNotFoundError(f"{error}{hint}") from error
    if error is not None:
        raise error
    for _, _, _, told, _ in outcomes:
        if told is not None:
            kind, text = told
            raise kind(f"{text}{hint}")
    return [(local, node, found) for local, node, found, _, _ in outcomes]


def _disk_hint(acted: list[tuple[str, Trouble | None]]) -> str:
    """What to say where some hosts found a checkpoint and others did not; else nothing."""
    without = {host for host, told in acted if told is not None and told[0] is CheckpointNotFoundError}
    found = {host for host, told in acted if told is None} - without
    if not found or not without:
        return ""
    return (
        f" Host {min(found)} finds it, and host {min(without)} does not: save to a file system that all machines "
        "share, or copy the checkpoint to the same path on each."
    )
