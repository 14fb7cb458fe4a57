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
    refuse_ranks_beyond,
    require_number,
    require_port,
    require_variable,
)
from treadle_fabric.errors import MisconfigurationException

__all__ = ["LSFEnvironment"]

# Those of the job are also in the batch script, which jsrun did not start; those of JSM are jsrun's.
_JOB = ("LSB_JOBID",)
_HOSTS = ("LSB_DJOB_RANKFILE", "LSB_HOSTS", "LSB_MCPU_HOSTS")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_BELOW = (
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    ("JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
)
_JSRUN = ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK")


class LSFEnvironment(StartedEnvironment):
    """Processes started by ``jsrun``, one for each device.

    The rank file that LSF names in LSB_DJOB_RANKFILE lists the hosts: on many clusters the launch node first, on which
    no process runs, then one line per slot. Without the file, LSB_HOSTS lists them likewise, or LSB_MCPU_HOSTS, which
    has the number of slots after each host. MASTER_ADDR and MASTER_PORT win over what follows from these.

    Raises:
        MisconfigurationException: The rank file is empty or cannot be read; raised when a rank or address is asked for.
    """

    collects_output = True

    @cached_property
    def _hosts(self) -> list[str]:
        return _compute_hosts(_read_slots(self.variables), self._count_nodes())

    @property
    def main_address(self) -> str:
        return self.variables.get("MASTER_ADDR") or self._hosts[0]

    @property
    def main_port(self) -> int:
        if "MASTER_PORT" in self.variables:
            return require_port(self.variables)
        # All ranks know the job's number, and two jobs on one machine have different numbers.
        return 10000 + require_number("LSB_JOBID", self.variables) % 1000

    @staticmethod
    def examine(environ: Mapping[str, str] | None = None) -> Finding:
        """Return whether jsrun started this process, and by which variables that was decided."""
        environ = os.environ if environ is None else environ
        found = pick((*_JOB, *_HOSTS[:1], *_JSRUN), environ)
        missing = [name for name in (*_JOB, *_JSRUN) if name not in found]
        if not missing and not pick((*_HOSTS, "MASTER_ADDR"), environ):
            missing = [_HOSTS[0]]
        if missing:
            return Finding(False, found, f"jsrun did not start this process: {', '.join(missing)} not set.")
        rank, size = found["JSM_NAMESPACE_RANK"], found["JSM_NAMESPACE_SIZE"]
        return Finding(True, found, f"jsrun started this process as rank {rank} of {size}.")

    def world_size(self) -> int:
        return require_number("JSM_NAMESPACE_SIZE", self.variables, minimum=1)

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
            f"This host, {host!r}, is not among those of {_source(self.variables)}: {', '.join(self._hosts)}. Start "
            "the script with jsrun, or pass plugins=LightningEnvironment()."
        )

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        refuse_ranks_beyond(_BELOW, self.variables, "jsrun")
        remedy = "Make the numbers equal: `jsrun --nrs NODES --tasks_per_rs DEVICES` with one resource set on a host."
        self.check_count(num_devices, num_nodes, "jsrun", remedy)

    def processes_per_node(self) -> int | None:
        if "JSM_NAMESPACE_LOCAL_SIZE" not in self.variables:
            return None
        return require_number("JSM_NAMESPACE_LOCAL_SIZE", self.variables, minimum=1)

    def _count_nodes(self) -> int | None:
        here = self.processes_per_node()
        return None if here is None else -(-self.world_size() // here)

    def evidence(self) -> dict[str, str]:
        return pick(
            (*_JOB, _source(self.variables), *_JSRUN, "JSM_NAMESPACE_LOCAL_SIZE", *_MEETING),
            self.variables,
        )

    def explain_ranks(self, world_size: int) -> str:
        said = list_variables(pick(_JSRUN[:1], self.variables))
        return f"{said} says that jsrun started {world_size} processes. Start the script with jsrun, in all of them."


def _source(environ: Mapping[str, str]) -> str:
    """The variable that lists the hosts."""
    return next((name for name in _HOSTS if environ.get(name)), _HOSTS[0])


def _read_slots(environ: Mapping[str, str]) -> list[str]:
    """Read the host of each slot of the job, in the order of LSF's."""
    source = _source(environ)
    value = require_variable(source, environ)
    slots = value.split()
    if source == "LSB_DJOB_RANKFILE":
        try:
            slots = Path(value).read_text().split()
        except OSError as exc:
            raise MisconfigurationException(
                f"LSB_DJOB_RANKFILE={value!r} cannot be read ({exc.strerror}), and LSF lists the hosts there. Set "
                "MASTER_ADDR to the first host, or ask the cluster's people."
            ) from exc
    elif source == "LSB_MCPU_HOSTS":
        counts = slots[1::2]
        if len(slots) % 2 or not all(map(str.isdecimal, counts)):
            raise MisconfigurationException(
                f"LSB_MCPU_HOSTS={value!r} has to have a number of slots after each host, as LSF sets it: 'a 1 b 4'. "
                "Do not change it, or set LSB_HOSTS."
            )
        slots = [host for host, count in zip(slots[::2], counts) for _ in range(int(count))]
    if not slots:
        raise MisconfigurationException(f"{source}={value!r} is empty, and LSF lists the hosts there.")
    return slots


def _compute_hosts(slots: list[str], nodes: int | None) -> list[str]:
    """Find the hosts that compute, each once, in the order of the slots.

    Args:
        slots: The host of each slot.
        nodes: The number of hosts on which processes run; None where it is not known.
    """
    distinct = list(dict.fromkeys(slots))
    # The first slot may be the launch node's, which computes only if it has another slot, or all hosts are needed.
    if len(distinct) > 1 and slots.count(distinct[0]) == 1 and nodes != len(distinct):
        distinct = distinct[1:]
    return distinct
