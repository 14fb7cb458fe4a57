"""``treadle migrate``: rewrite programs for Lightning as programs for Treadle, once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from treadle_fabric import require_package

__all__ = ["add_migrate_command"]


def add_migrate_command(commands: Any) -> None:
    """Add ``migrate`` to the subparsers of a command line."""
    parser = commands.add_parser(
        "migrate",
        help="rewrite programs for Lightning; exit status 1 if something is left to do by hand",
        description=(
            "Rewrite programs, notebooks and configs that name lightning, pytorch_lightning or lightning_fabric."
            " Formatting and comments stay. What cannot be rewritten is listed with its file, line and remedy."
        ),
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", type=Path, help="a file, or a folder of them")
    parser.add_argument("--dry-run", action="store_true", help="print a unified diff, and write nothing")
    parser.set_defaults(run=_command)


def _command(given: argparse.Namespace) -> int:
    require_package("libcst", "treadle migrate", "cli")
    from treadle.compat.migrate.tree import Tree  # of an extra

    tree = Tree(given.paths)
    changed = unread = left = 0
    for outcome in tree.migrate(write=not given.dry_run):
        changed += outcome.changed
        unread += outcome.unread
        left += len(outcome.findings)
        if given.dry_run:
            sys.stdout.flush()
            sys.stdout.buffer.write(outcome.diff())
        for line, what, remedy in outcome.findings:
            print(f"{outcome.path}:{line}: {what}: {remedy}", file=sys.stderr if given.dry_run else sys.stdout)
    did = "would be rewritten" if given.dry_run else "rewritten"
    print(
        f"{_count(changed, 'file')} of {len(tree.files)} {did}, {_count(left, 'place')} left to you"
        + (f" ({_count(unread, 'file')} could not be read)" if unread else "")
        + ".",
        file=sys.stderr if given.dry_run else sys.stdout,
    )
    return 1 if left else 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
