"""``treadle-fabric environment``: what the runtime finds on this machine, and what it would start."""

from __future__ import annotations

import argparse
import os
from typing import Any

from treadle_fabric.environments import ClusterEnvironment, detect, examine_all
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.resolve import Plan, available_devices, resolve

__all__ = ["add_environment_command"]

_STARTS = {
    "none": "nothing: the script runs in this process",
    "external": "nothing: the processes are there already",
    "subprocess": "the script again, once for each further process on this machine",
}


def add_environment_command(commands: Any) -> None:
    """Add ``environment`` to the commands of a parser."""
    about = (
        "Print which environment is detected, from which variables, and what Fabric or the Trainer would start with "
        "these arguments. Nothing is started, and no other process is waited for. Run it as the script is run: after "
        "srun, mpirun or torchrun --no-python, if it is started so."
    )
    what = "what started this process, and what would run"
    parser = commands.add_parser("environment", help=what, description=about)
    parser.add_argument("--accelerator", default="auto", help="as for Fabric; default: auto")
    parser.add_argument("--strategy", default="auto", help="as for Fabric; default: auto")
    parser.add_argument("--devices", default="auto", help="a number, a list such as 0,1, or -1; default: auto")
    parser.add_argument("--num-nodes", "--num_nodes", type=int, default=1, help="machines; default: 1")
    parser.set_defaults(run=_print_environment)


def _print_environment(given: argparse.Namespace) -> int:
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
        _print_lines("Warnings", dict(enumerate(detection.warnings, start=1)))
    others = {
        kind.__name__: finding.reason + (f" Set: {_named(finding.variables)}." if finding.variables else "")
        for kind, finding in findings.items()
    }
    _print_lines("All environments, and what they look for", others)
    _print_lines("Devices of this machine", devices)
    asked = {name: getattr(given, name) for name in ("accelerator", "strategy", "devices", "num_nodes")}
    call = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    _print_lines(f"With {call}", _what_would_run(asked, variables, devices))
    return 0


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
        return facts | (environment.describe() or _ranks(environment))
    except MisconfigurationException as e:
        return facts | {"incomplete": str(e)}


def _ranks(environment: ClusterEnvironment) -> dict[str, str]:
    return {
        "global rank": f"{environment.global_rank()} of {environment.world_size()}",
        "local rank": str(environment.local_rank()),
        "node rank": str(environment.node_rank()),
        "meeting point": f"{environment.main_address}:{environment.main_port}",
    }


def _named(variables: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in variables.items())


def _print_lines(title: str, lines: dict[Any, Any]) -> None:
    if lines:
        print(f"{title}:")
        for name, value in lines.items():
            print(f"  {name}: {value}")
