"""The command ``treadle-fabric``: what the runtime finds on this machine, and what it would start."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from treadle_fabric.environments import ClusterEnvironment, detect, examine_all
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.resolve import Plan, available_devices, resolve

__all__ = ["main"]

_STARTS = {
    "none": "nothing: the script runs in this process",
    "external": "nothing: the processes are there already",
    "subprocess": "the script again, once for each further process on this machine",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Args:
        arguments: The arguments after the command's name. Default: those of the process.
    """
    parser = argparse.ArgumentParser("treadle-fabric", description="Tools for the runtime under training loops.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    about = (
        "Print which environment is detected, from which variables, and what Fabric or the Trainer would start with "
        "these arguments. Nothing is started, and no other process is waited for. Run it as the script is run: after "
        "srun, mpirun or torchrun --no-python, if it is started so."
    )
    environment = commands.add_parser(
        "environment", help="what started this process, and what would run", description=about
    )
    environment.add_argument("--accelerator", default="auto", help="as for Fabric; default: auto")
    environment.add_argument("--strategy", default="auto", help="as for Fabric; default: auto")
    environment.add_argument(
        "--devices", default="auto", help="a number, a list such as 0,1, auto or -1; default: auto"
    )
    environment.add_argument(
        "--num-nodes", "--num_nodes", type=int, default=1, help="the number of machines; default: 1"
    )
    environment.set_defaults(run=_print_environment)
    given = parser.parse_args(arguments)
    try:
        given.run(given)
        sys.stdout.flush()
    except BrokenPipeError:  # the program that reads, `head` for example, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at exit
    return 0


def _print_environment(given: argparse.Namespace) -> None:
    variables = dict(os.environ)  # a copy, from which nothing is removed
    findings = examine_all(variables)
    devices = available_devices()
    try:
        detection = detect(variables)
    except MisconfigurationException as e:  # a variable is malformed, which ends a run, too
        _print_lines("Environment", {"none": str(e)})
    else:
        chosen = detection.environment
        _print_lines("Environment", {type(chosen).__name__: detection.reason, **_facts(chosen)})
        _print_lines("Notes", dict(enumerate(detection.notes, start=1)))
    others = {
        kind.__name__: finding.reason + (f" Set: {_named(finding.variables)}." if finding.variables else "")
        for kind, finding in findings.items()
    }
    _print_lines("All environments, and what they look for", others)
    _print_lines("Devices of this machine", devices)
    asked = {name: getattr(given, name) for name in ("accelerator", "strategy", "devices", "num_nodes")}
    call = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    _print_lines(f"With {call}", _what_would_run(asked, variables, devices))


def _what_would_run(asked: dict[str, Any], variables: dict[str, str], devices: dict[str, int]) -> dict[str, str]:
    try:
        plan = resolve(**asked, environ=variables, available=devices, interactive=False)
    except MisconfigurationException as e:
        return {"refused": str(e)}
    return {
        "accelerator": plan.accelerator.name(),
        "strategy": str(plan.strategy),
        "devices": ", ".join(str(device) for device in plan.devices),
        "processes": f"{plan.num_processes} on this machine, {plan.world_size} in all",
        "starts": _started(plan),
    }


def _started(plan: Plan) -> str:
    if plan.launcher == "subprocess" and plan.world_size == 1:
        return _STARTS["none"]
    return _STARTS.get(plan.launcher, f"{plan.num_processes} new processes, by {plan.launcher}")


def _facts(environment: ClusterEnvironment) -> dict[str, str]:
    facts = {"variables": _named(environment.evidence()) or "none that it reads is set"}
    try:
        return facts | environment.describe()
    except MisconfigurationException as e:
        return facts | {"incomplete": str(e)}


def _named(variables: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in variables.items())


def _print_lines(title: str, lines: dict[Any, Any]) -> None:
    if lines:
        print(f"{title}:")
        for name, value in lines.items():
            print(f"  {name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
