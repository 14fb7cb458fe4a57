"""``treadle-fabric run``: start a script in every process, with the options that the script leaves open."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from treadle_fabric.environments import LightningEnvironment
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.launchers import run_script
from treadle_fabric.resolve import Plan, resolve, run_variables

__all__ = ["add_run_command"]


def add_run_command(commands: Any) -> None:
    """Add ``run`` to the commands of a parser."""
    about = (
        "Run a script that uses Fabric or the Trainer in every process. The options are used where the script leaves "
        "the default; what the script itself says, it keeps. An option of a wrong value ends the command before the "
        "script starts. Where torchrun, srun or mpirun started this command, nothing more is started."
    )
    parser = commands.add_parser("run", help="start a script in several processes", description=about)
    parser.add_argument("--accelerator", help="cpu, cuda, gpu, mps or auto; default: what the script says, or auto")
    parser.add_argument("--strategy", help="ddp, for example; default: what the script says, or auto")
    parser.add_argument("--devices", help="processes of each machine: a number, a list such as 0,1, or -1 for all")
    parser.add_argument("--num-nodes", "--num_nodes", type=int, help="machines; default: 1")
    parser.add_argument("--node-rank", "--node_rank", type=int, help="the number of this machine, from 0")
    parser.add_argument("--main-address", "--main_address", help="host name or address of machine 0")
    parser.add_argument("--main-port", "--main_port", type=int, help="a free port on machine 0; default on one: any")
    parser.add_argument("--precision", help="bf16-mixed, for example; default: what the script says, or 32-true")
    parser.add_argument("script", metavar="SCRIPT", help="the Python file")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="arguments of the script")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> int:
    if not os.path.isfile(given.script):
        print(f"treadle-fabric: there is no file {given.script!r} to run.", file=sys.stderr)
        return 2
    command = [sys.executable, given.script, *given.arguments]
    try:
        options, meeting = _options(given), _meeting_point(given)
        plan = _plan(options, meeting)
    except MisconfigurationException as e:
        print(f"treadle-fabric: {e}", file=sys.stderr)
        return 2
    started = plan.launcher == "external"
    if started or plan.world_size == 1:
        variables = run_variables(options, launched=started)
        os.execve(sys.executable, command, {**os.environ, **variables, **({} if started else meeting)})
    variables = run_variables({**options, "devices": options.get("devices", str(plan.num_processes))}, launched=True)
    os.environ.update(meeting)
    return run_script(command, LightningEnvironment(), plan.num_processes, plan.num_nodes, variables)


def _options(given: argparse.Namespace) -> dict[str, Any]:
    """The options that were given."""
    names = ("accelerator", "strategy", "devices", "num_nodes", "precision")
    return {name: getattr(given, name) for name in names if getattr(given, name) is not None}


def _meeting_point(given: argparse.Namespace) -> dict[str, str]:
    """The environment variables by which machines find one another, as far as they were given as options.

    Raises:
        MisconfigurationException: There are several machines, and one is missing.
    """
    options = {"NODE_RANK": given.node_rank, "MASTER_ADDR": given.main_address, "MASTER_PORT": given.main_port}
    found = {name: str(value) for name, value in options.items() if value is not None}
    nodes = given.num_nodes or 1
    if given.node_rank is not None and not 0 <= given.node_rank < nodes:
        raise MisconfigurationException(
            f"--node-rank={given.node_rank}, but machines are numbered from 0, and --num-nodes={nodes}."
        )
    if given.main_port is not None and not 0 < given.main_port < 65536:
        raise MisconfigurationException(f"--main-port={given.main_port} must be a port number from 1 to 65535.")
    return found


def _plan(options: dict[str, Any], meeting: dict[str, str]) -> Plan:
    try:
        return resolve(**options, environ={**os.environ, **meeting}, interactive=False)
    except MisconfigurationException as e:
        if options.get("num_nodes", 1) > 1 and not {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= meeting.keys():
            raise MisconfigurationException(f"{e} Or give --main-address, --main-port and --node-rank.") from None
        raise
