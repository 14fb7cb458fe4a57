"""Processes started by mpirun."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from typing import Any, cast

from treadle_fabric.environments.environment import (
    Finding,
    StartedEnvironment,
    list_variables,
    pick,
    refuse_ranks_beyond,
    require_number,
    require_port,
)
from treadle_fabric.environments.local import find_free_port
from treadle_fabric.environments.slurm_job import job_to_requeue, signal_of_job
from treadle_fabric.errors import MisconfigurationException

__all__ = ["MPIEnvironment"]

# The variables that MPI launchers set: Open MPI, then MPICH, Intel MPI and Cray's (PALS), then MVAPICH.
_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
_LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_KVSNAME")


class MPIEnvironment(StartedEnvironment):
    """Processes started by ``mpirun`` or ``mpiexec``.

    Ranks come from the variables that the MPI launcher sets. On several machines, mpi4py is asked for what these
    variables do not tell: address and port, unless MASTER_ADDR and MASTER_PORT are set, and the rank of the machine,
    unless ranks are dealt out to machines by slots or by nodes.
    """

    collects_output = True

    def __init__(self) -> None:
        self._port: int | None = None

    @property
    def main_address(self) -> str:
        if "MASTER_ADDR" in self.variables:
            return self.variables["MASTER_ADDR"]
        if self._is_on_one_node():
            return "127.0.0.1"
        return cast(str, self._world.bcast(socket.gethostname(), root=0))

    @property
    def main_port(self) -> int:
        if "MASTER_PORT" in self.variables:
            return require_port(self.variables)
        job = _first(_JOB, self.variables)
        if self._is_on_one_node() and job is not None:
            return 12000 + zlib.crc32(self.variables[job].encode()) % 16000  # all ranks know the job's name
        if self._port is None:
            self._port = cast(int, self._world.bcast(find_free_port(), root=0))
        return self._port

    @staticmethod
    def examine(environ: Mapping[str, str] | None = None) -> Finding:
        """Return whether mpirun started this process as one of several, and by which variables that was decided."""
        environ = os.environ if environ is None else environ
        names = [name for name in (_first(_SIZE, environ), _first(_RANK, environ)) if name]
        found, size = pick(names, environ), _number(_SIZE, environ)
        if size is None or size <= 1:
            return Finding(False, found, f"mpirun with several processes sets one of {', '.join(_SIZE)}.")
        return Finding(True, found, f"mpirun started this process as one of {size} ({list_variables(found)}).")

    def agrees_with(self, world_size: int, global_rank: int) -> bool:
        """Return whether the launcher's variables give the process this rank among so many processes."""
        return (_number(_SIZE, self.variables), _number(_RANK, self.variables)) == (world_size, global_rank)

    def world_size(self) -> int:
        size = _number(_SIZE, self.variables)
        return size if size is not None else cast(int, self._world.Get_size())

    def global_rank(self) -> int:
        rank = _number(_RANK, self.variables)
        return rank if rank is not None else cast(int, self._world.Get_rank())

    def local_rank(self) -> int:
        rank = _number(_LOCAL_RANK, self.variables)
        return rank if rank is not None else self._places[self.global_rank()][1]

    def node_rank(self) -> int:
        if self._is_on_one_node():
            return 0
        told = self._node_of_variables()
        return self._places[self.global_rank()][0] if told is None else told

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        ranks = [_first(names, self.variables) for names in (_RANK, _LOCAL_RANK)]
        counts = [_first(names, self.variables) for names in (_SIZE, _LOCAL_SIZE)]
        pairs = [(rank, count) for rank, count in zip(ranks, counts) if rank and count]
        refuse_ranks_beyond(pairs, self.variables, "The MPI launcher")
        remedy = "Make the numbers equal; devices='auto' takes the number of processes on a machine."
        self.check_count(num_devices, num_nodes, "MPI", remedy)

    def processes_per_node(self) -> int | None:
        return _number(_LOCAL_SIZE, self.variables)

    def announcing_signal(self) -> int:
        return signal_of_job(self.variables)

    def job_to_requeue(self) -> str:
        return job_to_requeue(self.variables)

    def evidence(self) -> dict[str, str]:
        chosen = [_first(names, self.variables) for names in (_SIZE, _RANK, _LOCAL_SIZE, _LOCAL_RANK, _JOB)]
        return pick((*filter(None, chosen), "MASTER_ADDR", "MASTER_PORT"), self.variables)

    def explain_ranks(self, world_size: int) -> str:
        said = list_variables(pick(filter(None, [_first(_SIZE, self.variables)]), self.variables)) or "MPI"
        return (
            f"{said} says that mpirun started {world_size} processes. If mpirun did not start this one, the variable "
            "is left over or was inherited: unset it, or pass plugins=LightningEnvironment()."
        )

    def describe(self) -> dict[str, str]:
        asked = "mpi4py tells it when the run starts"  # by messages, for which this process would wait
        rank, local = _number(_RANK, self.variables), _number(_LOCAL_RANK, self.variables)
        address, port = self.variables.get("MASTER_ADDR"), self.variables.get("MASTER_PORT")
        if self._is_on_one_node():
            address = self.main_address
            port = str(self.main_port) if port or _first(_JOB, self.variables) else None
        node = 0 if self._is_on_one_node() else self._node_of_variables()
        return {
            "global rank": f"{asked if rank is None else rank} of {_number(_SIZE, self.variables) or asked}",
            "local rank": asked if local is None else str(local),
            "node rank": asked if node is None else str(node),
            "meeting point": f"{address}:{port}" if address and port else asked,
        }

    def _is_on_one_node(self) -> bool:
        return self.processes_per_node() == self.world_size()

    def _node_of_variables(self) -> int | None:
        """The rank of this machine, where the ranks are dealt out by slots or by nodes; None where they are not."""
        here, local = _number(_LOCAL_SIZE, self.variables), _number(_LOCAL_RANK, self.variables)
        rank, size = _number(_RANK, self.variables), _number(_SIZE, self.variables)
        if None in (here, local, rank, size) or not here or cast(int, size) % here:
            return None
        nodes = cast(int, size) // here
        if cast(int, rank) % here == local:
            return cast(int, rank) // here
        return cast(int, rank) % nodes if cast(int, rank) // nodes == local else None

    @cached_property
    def _world(self) -> Any:
        if find_spec("mpi4py") is None:
            raise MisconfigurationException(
                "The variables of this MPI launcher do not tell every rank, address and port, and mpi4py, which does, "
                "is not installed. Install mpi4py, or set MASTER_ADDR and MASTER_PORT for all processes (mpirun -x "
                "MASTER_ADDR ...)."
            )
        from mpi4py import MPI  # starts MPI

        return MPI.COMM_WORLD

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """The node rank and the local rank of each global rank."""
        hosts = self._world.allgather(socket.gethostname())
        nodes = list(dict.fromkeys(hosts))
        return [(nodes.index(host), hosts[:rank].count(host)) for rank, host in enumerate(hosts)]


def _first(names: tuple[str, ...], environ: Mapping[str, str]) -> str | None:
    """Return the first of the names that is set; None if none is."""
    return next((name for name in names if name in environ), None)


def _number(names: tuple[str, ...], environ: Mapping[str, str]) -> int | None:
    name = _first(names, environ)
    least = 1 if names in (_SIZE, _LOCAL_SIZE) else 0
    return None if name is None else require_number(name, environ, minimum=least)
