"""What is left for a person to do: a place in a file, what it has, and the remedy."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Finding", "Migrated"]


class Finding(NamedTuple):
    """Something that is not rewritten, because only its author knows what it should do."""

    line: int
    what: str
    remedy: str


class Migrated(NamedTuple):
    """A text after it was rewritten, and what is left to do in it."""

    text: str
    findings: list[Finding]
