"""``treadle run``: run a program that was written for Lightning, as it is."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

from treadle.compat import SHIM
from treadle_fabric import MisconfigurationException

__all__ = ["add_run_command"]


def add_run_command(commands: Any) -> None:
    """Add ``run`` to the commands of a parser."""
    parser = commands.add_parser(
        "run",
        usage="treadle run (SCRIPT | -m MODULE | -c CODE | -) [ARGS ...]",
        help="run a program that was written for Lightning",
        description=(
            "Run a Python program in which lightning, pytorch_lightning and lightning_fabric are Treadle, in all"
            " processes that it starts. The program is found and started as by `python`, with the same arguments."
        ),
    )
    rest = {"nargs": argparse.REMAINDER, "default": []}
    parser.add_argument("-m", dest="module", metavar="MODULE", **rest, help="a module, as python -m runs it")
    parser.add_argument("-c", dest="code", metavar="CODE", **rest, help="Python code, as python -c runs it")
    parser.add_argument("script", metavar="SCRIPT", nargs="?", help="a Python file; - reads it from the standard input")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="arguments of the program")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> int:
    command = [sys.executable, *subprocess._args_from_interpreter_flags(), *_program(given)]  # type: ignore[attr-defined]
    if sys.flags.ignore_environment:
        raise MisconfigurationException(
            "treadle run works by the environment variable PYTHONPATH, which the options -I and -E of python ignore:"
            " leave them out."
        )
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(SHIM), inherited] if inherited else [str(SHIM)])
    environ = {**os.environ, "PYTHONPATH": path}
    sys.stdout.flush()
    if os.name == "nt":  # where exec returns to the shell at once
        return subprocess.call(command, env=environ)
    os.execve(sys.executable, command, environ)


def _program(given: argparse.Namespace) -> list[str]:
    """What python is told to run."""
    for option, words in (("-m", given.module), ("-c", given.code)):
        if words:
            return [option, *words]
    if given.script is None:
        raise MisconfigurationException("There is nothing to run: give a script, -m and a module, or -c and code.")
    if given.script != "-" and not os.path.exists(given.script):
        raise MisconfigurationException(f"There is no file {given.script!r} to run.")
    return [given.script, *given.arguments]
