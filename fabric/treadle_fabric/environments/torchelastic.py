"""Processes started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Mapping

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
from treadle_fabric.environments.slurm_job import job_to_requeue, signal_of_job

__all__ = ["TorchElasticEnvironment"]

_REQUIRED = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE")
_BELOW = (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("GROUP_RANK", "GROUP_WORLD_SIZE"))
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_READ = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", *_MEETING)


class TorchElasticEnvironment(StartedEnvironment):
    """Processes started by ``torchrun``, which may also restart them, and then with another number of machines.

    ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``LOCAL_WORLD_SIZE``, ``GROUP_RANK`` and ``GROUP_WORLD_SIZE`` are read,
    and MASTER_ADDR and MASTER_PORT, which torchrun sets to where its own agents met.
    """

    @property
    def main_address(self) -> str:
        return require_variable("MASTER_ADDR", self.variables)

    @property
    def main_port(self) -> int:
        return require_port(self.variables)

    @staticmethod
    def examine(environ: Mapping[str, str] | None = None) -> Finding:
        """Return whether torchrun started this process, and by which variables that was decided."""
        environ = os.environ if environ is None else environ
        found = pick(_REQUIRED, environ)
        missing = [name for name in _REQUIRED if name not in found]
        if not missing:
            reason = f"torchrun started this process as rank {found['RANK']} of {found['WORLD_SIZE']}."
            return Finding(True, found, reason)
        note = ""
        if "TORCHELASTIC_RUN_ID" in found:  # a script that a worker started, after it removed the ranks
            note = f"TORCHELASTIC_RUN_ID is not followed, because torchrun also sets {', '.join(missing)}."
        return Finding(False, found, f"torchrun did not start this process: {', '.join(missing)} not set.", note)

    def world_size(self) -> int:
        return require_number("WORLD_SIZE", self.variables, minimum=1)

    def global_rank(self) -> int:
        return require_number("RANK", self.variables)

    def local_rank(self) -> int:
        return require_number("LOCAL_RANK", self.variables)

    def node_rank(self) -> int:
        return require_number("GROUP_RANK", self.variables, default=0)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        refuse_ranks_beyond(_BELOW, self.variables, "torchrun")
        remedy = (
            "Make devices equal to --nproc-per-node and num_nodes to --nnodes; devices='auto' takes the number of "
            "processes that torchrun started on a machine. With a range of machines, as in --nnodes 1:2, pass "
            "num_nodes=int(os.environ['GROUP_WORLD_SIZE'])."
        )
        self.check_count(num_devices, num_nodes, "torchrun", remedy)

    def processes_per_node(self) -> int | None:
        if "LOCAL_WORLD_SIZE" not in self.variables:
            return None
        return require_number("LOCAL_WORLD_SIZE", self.variables, minimum=1)

    def announcing_signal(self) -> int:
        return signal_of_job(self.variables)

    def job_to_requeue(self) -> str:
        return job_to_requeue(self.variables)

    def evidence(self) -> dict[str, str]:
        return pick(("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", *_READ), self.variables)

    def explain_ranks(self, world_size: int) -> str:
        said = list_variables(pick(("WORLD_SIZE", "TORCHELASTIC_RUN_ID"), self.variables))
        return (
            f"{said} say that torchrun started {world_size} processes. If torchrun did not start this one, the "
            "variables are left over or were inherited from a process of torchrun's: start the script with `env -u "
            "TORCHELASTIC_RUN_ID -u RANK -u LOCAL_RANK -u WORLD_SIZE -u MASTER_PORT python ...`."
        )
