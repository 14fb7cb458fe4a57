"""Launchers run a function in every process of a run.

- ``launcher``: what a launcher is. Open it first.
- ``subprocess``: starts the script again for each further rank. ``spawn``: makes processes out of this one.
  ``external``: processes that torchrun, SLURM, MPI or a subprocess launcher started.
- ``script``: starts a script in every process, for ``treadle-fabric run``.
- ``supervisor``: what launchers do for the processes that they started.
- ``listener``: hears of a signal while the main thread waits in a collective.
- ``under_pytest``: what differs where a test launches.

How processes tell one another of a failure is in :mod:`treadle_fabric.failures`. Launchers import failures,
environments and the foundation; strategies import launchers.
"""

from __future__ import annotations

from typing import Literal

from treadle_fabric.environments.environment import ClusterEnvironment
from treadle_fabric.launchers.external import ExternalLauncher
from treadle_fabric.launchers.launcher import Launcher
from treadle_fabric.launchers.listener import SignalListener
from treadle_fabric.launchers.script import run_script
from treadle_fabric.launchers.spawn import SpawnLauncher
from treadle_fabric.launchers.subprocess import SubprocessLauncher, in_notebook, launched_here, settle

__all__ = [
    "ExternalLauncher",
    "Launcher",
    "SignalListener",
    "SpawnLauncher",
    "SubprocessLauncher",
    "in_notebook",
    "launched_here",
    "make_launcher",
    "run_script",
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
