"""Launchers get a function to run in every process of a run."""

from __future__ import annotations

from typing import Literal

from treadle_fabric.environments.environment import ClusterEnvironment
from treadle_fabric.launchers.external import ExternalLauncher
from treadle_fabric.launchers.failures import claim_failure, end_run, first_failure
from treadle_fabric.launchers.launcher import Launcher
from treadle_fabric.launchers.listener import SignalListener
from treadle_fabric.launchers.spawn import SpawnLauncher
from treadle_fabric.launchers.store_board import join_group, leave_group
from treadle_fabric.launchers.subprocess import SubprocessLauncher, in_notebook, launched_here, settle

__all__ = [
    "ExternalLauncher",
    "Launcher",
    "SignalListener",
    "SpawnLauncher",
    "SubprocessLauncher",
    "claim_failure",
    "end_run",
    "first_failure",
    "in_notebook",
    "join_group",
    "launched_here",
    "leave_group",
    "make_launcher",
    "settle",
]


def make_launcher(
    environment: ClusterEnvironment,
    num_processes: int,
    num_nodes: int = 1,
    start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
) -> Launcher:
    """The launcher for this environment.

    Args:
        environment: If it creates the processes itself, they are only called.
        num_processes: Processes on this machine.
        num_nodes: Machines.
        start_method: ``"popen"`` starts the script again; the others run a function, on one machine.
    """
    if launched_here():  # in the launching process it looks as if somebody else had created the processes
        return SubprocessLauncher(environment, num_processes, num_nodes)
    if environment.creates_processes_externally:
        return ExternalLauncher(environment)
    if start_method == "popen":
        return SubprocessLauncher(environment, num_processes, num_nodes)
    return SpawnLauncher(environment, num_processes, start_method)
