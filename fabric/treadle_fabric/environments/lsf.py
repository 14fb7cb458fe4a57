"""Processes started by jsrun in an LSF job."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from treadle_fabric.environments.environment import (
    Finding,
    StartedEnvironment,
    list_variables,
    pick,
    require_number,
    require_variable,
)
from treadle_fabric.errors import MisconfigurationException

__all__ = ["LSFEnvironment"]

# Those of the job are also in the batch script, which jsrun did not start; those of JSM are jsrun's.
_JOB = ("LSB_JOBID", "LSB_DJOB_RANKFILE")
_JSRUN = ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK")


class LSFEnvironment(StartedEnvironment):
    """Processes started by ``jsrun``, one for each device.

    The rank file that LSF names in LSB_DJOB_RANKFILE lists the hosts: the launch node first, then one line per slot.

    Raises:
        MisconfigurationException: The rank file is empty or cannot be read; raised when a rank or address is asked for.
    """

    collects_output = True

    @cached_property
    def _hosts(self) -> list[str]:
        return _compute_hosts(require_variable("LSB_DJOB_RANKFILE", self.variables))

    @property
    def main_address(self) -> str:
        return self._hosts[0]

    @property
    def main_port(self) -> int:
        if "MASTER_PORT" in self.variables:
            return require_number("MASTER_PORT", self.variables)
        # All ranks know the job's number, and two jobs on one machine have different numbers.
        return 10000 + require_number("LSB_JOBID", self.variables) % 1000

    @staticmethod
    def examine(environ: Mapping[str, str] | None = None) -> Finding:
        """Return whether jsrun started this process, and by which variables that was decided."""
        environ = os.environ if environ is None else environ
        found = pick((*_JOB, *_JSRUN), environ)
        missing = [name for name in (*_JOB, *_JSRUN) if name not in found]
        if missing:
            return Finding(False, found, f"jsrun did not start this process: {', '.join(missing)} not set.")
        rank, size = found["JSM_NAMESPACE_RANK"], found["JSM_NAMESPACE_SIZE"]
        return Finding(True, found, f"jsrun started this process as rank {rank} of {size}.")

    def world_size(self) -> int:
        return require_number("JSM_NAMESPACE_SIZE", self.variables)

    def global_rank(self) -> int:
        return require_number("JSM_NAMESPACE_RANK", self.variables)

    def local_rank(self) -> int:
        return require_number("JSM_NAMESPACE_LOCAL_RANK", self.variables)

    def node_rank(self) -> int:
        host = socket.gethostname()
        for rank, name in enumerate(self._hosts):
            if name == host or name.split(".")[0] == host.split(".")[0]:
                return rank
        raise MisconfigurationException(
            f"This host, {host!r}, is not among those of LSB_DJOB_RANKFILE: {', '.join(self._hosts)}. Start the "
            "script with jsrun, or pass plugins=LightningEnvironment()."
        )

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        self.check_count(num_devices, num_nodes, "jsrun", "Make them equal.")

    def processes_per_node(self) -> int | None:
        if "JSM_NAMESPACE_LOCAL_SIZE" not in self.variables:
            return None
        return require_number("JSM_NAMESPACE_LOCAL_SIZE", self.variables)

    def evidence(self) -> dict[str, str]:
        return pick((*_JOB, *_JSRUN, "JSM_NAMESPACE_LOCAL_SIZE", "MASTER_PORT"), self.variables)

    def explain_ranks(self, world_size: int) -> str:
        said = list_variables(pick(_JSRUN[:1], self.variables))
        return f"{said} says that jsrun started {world_size} processes. Start the script with jsrun, in all of them."


def _compute_hosts(rank_file: str) -> list[str]:
    """Read the hosts that compute, each once, in the order of the file."""
    try:
        hosts = Path(rank_file).read_text().split()
    except OSError as exc:
        raise MisconfigurationException(
            f"LSB_DJOB_RANKFILE={rank_file!r} cannot be read ({exc.strerror}), and LSF lists the hosts there."
        ) from exc
    distinct = list(dict.fromkeys(hosts))
    if not distinct:
        raise MisconfigurationException(f"LSB_DJOB_RANKFILE={rank_file!r} is empty, and LSF lists the hosts there.")
    # The first line is the launch node. It computes only if it has another line.
    if len(distinct) > 1 and hosts.count(distinct[0]) == 1:
        distinct = distinct[1:]
    return distinct
