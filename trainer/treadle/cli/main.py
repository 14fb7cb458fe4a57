"""The command ``treadle``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from treadle.cli.checkpoint import add_checkpoint_commands
from treadle.cli.migrate import add_migrate_command
from treadle.cli.plot import add_plot_command
from treadle.cli.replay import add_replay_command
from treadle.cli.run import add_run_command
from treadle_fabric import TreadleError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Args:
        arguments: The arguments after the command's name. Default: those of the process.
    """
    parser = argparse.ArgumentParser(
        "treadle", description="Programs of Lightning on Treadle, and tools for what runs leave behind."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_checkpoint_commands(commands)
    add_migrate_command(commands)
    add_plot_command(commands)
    add_replay_command(commands)
    add_run_command(commands)
    given = parser.parse_args(arguments)
    try:
        status: int = given.run(given)
        sys.stdout.flush()
    except BrokenPipeError:  # the program that reads, `head` for example, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at exit
        return 1
    except TreadleError as e:
        print(f"treadle: {e}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
