"""The command ``treadle-fabric``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from treadle_fabric.cli.consolidate import add_consolidate_command
from treadle_fabric.cli.environment import add_environment_command
from treadle_fabric.cli.estimate import add_estimate_command
from treadle_fabric.cli.run import add_run_command

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Args:
        arguments: The arguments after the command's name. Default: those of the process.
    """
    parser = argparse.ArgumentParser("treadle-fabric", description="Tools for the runtime under training loops.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_consolidate_command(commands)
    add_environment_command(commands)
    add_estimate_command(commands)
    add_run_command(commands)
    given = parser.parse_args(arguments)
    try:
        status: int = given.run(given)
        sys.stdout.flush()
    except BrokenPipeError:  # the program that reads, `head` for example, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at exit
        return 0
    return status


if __name__ == "__main__":
    sys.exit(main())
