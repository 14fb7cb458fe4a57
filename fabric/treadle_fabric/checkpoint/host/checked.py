"""Which checkpoints are known to be whole because another process of the host has read every byte of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["Identity", "is_checked", "noting_checks", "set_checked", "trusting"]

Identity = tuple[int, ...]
"""Device, inode, size and time of the last change of a file; see ``identity`` in ``folder/layout.py``."""
_noted: ContextVar[set[Identity] | None] = ContextVar("treadle_noted", default=None)
_trusted: ContextVar[frozenset[Identity]] = ContextVar("treadle_trusted", default=frozenset())


@contextmanager
def noting_checks() -> Iterator[set[Identity]]:
    """Give the set of what is checked inside."""
    noted: set[Identity] = set()
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


@contextmanager
def trusting(checked: Collection[Identity]) -> Iterator[None]:
    """What has one of these identities is not checked again inside; whatever else is loaded is."""
    token = _trusted.set(frozenset(checked))
    try:
        yield
    finally:
        _trusted.reset(token)


def is_checked(identity: Identity | None) -> bool:
    """Whether a checkpoint need not be checked here."""
    return identity is not None and identity in _trusted.get()


def set_checked(identity: Identity | None) -> None:
    """Note that every byte of a checkpoint was read and found right."""
    noted = _noted.get()
    if noted is not None and identity is not None:
        noted.add(identity)
