"""Processes started by srun in a SLURM job."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping

from treadle_fabric.environments.environment import StartedEnvironment, require_number
from treadle_fabric.errors import MisconfigurationException

__all__ = ["SLURMEnvironment"]

_INTERACTIVE_JOB_NAMES = ("bash", "interactive")


class SLURMEnvironment(StartedEnvironment):
    """Processes started by ``srun``, one for each device.

    Args:
        auto_requeue: Save a checkpoint and stop, with exit status 143, when the job's time is nearly up, so that the
            job can be queued again. SLURM has to send a signal before the end: ``#SBATCH --signal=SIGUSR1@90``.
            Default: True.
        requeue_signal: The signal that announces the end. Default: SIGUSR1.
    """

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | None = None) -> None:
        self.auto_requeue = auto_requeue
        if requeue_signal is None and hasattr(signal, "SIGUSR1"):
            requeue_signal = signal.SIGUSR1
        self.requeue_signal = requeue_signal

    @property
    def main_address(self) -> str:
        address = self.variables.get("MASTER_ADDR")
        if address is None:
            nodes = self.variables.get("SLURM_STEP_NODELIST") or self.variables.get("SLURM_NODELIST")
            nodes = nodes or self.variables.get("SLURM_JOB_NODELIST") or "127.0.0.1"
            address = self.resolve_root_node_address(nodes)
        return address

    @property
    def main_port(self) -> int:
        if "MASTER_PORT" in self.variables:
            return require_number("MASTER_PORT", self.variables)
        # All ranks know the job's number, and two jobs on one machine have different numbers.
        job = self.variables.get("SLURM_JOB_ID", "")
        return 15000 + int(job) % 10000 if job.isdecimal() else 29500

    @staticmethod
    def detect(environ: Mapping[str, str] | None = None) -> bool:
        environ = os.environ if environ is None else environ
        return "SLURM_NTASKS" in environ and environ.get("SLURM_JOB_NAME") not in _INTERACTIVE_JOB_NAMES

    @staticmethod
    def job_name() -> str | None:
        """Return the job's name; None outside a job."""
        return os.environ.get("SLURM_JOB_NAME")

    @staticmethod
    def job_id() -> int | None:
        """Return the job's number; None in an interactive job, and outside a job."""
        if SLURMEnvironment.job_name() in _INTERACTIVE_JOB_NAMES:
            return None
        try:
            return int(os.environ["SLURM_JOB_ID"])
        except (KeyError, ValueError):
            return None

    def world_size(self) -> int:
        return require_number("SLURM_NTASKS", self.variables)

    def global_rank(self) -> int:
        return require_number("SLURM_PROCID", self.variables)

    def local_rank(self) -> int:
        return require_number("SLURM_LOCALID", self.variables)

    def node_rank(self) -> int:
        return require_number("SLURM_NODEID", self.variables)

    def announcing_signal(self) -> int:
        """Return the number of ``requeue_signal`` with ``auto_requeue``, else 0."""
        return int(self.requeue_signal or 0) if self.auto_requeue else 0

    @staticmethod
    def resolve_root_node_address(nodes: str) -> str:
        """Return the first host of a list as SLURM writes it: ``alpha[02-04,7],beta`` gives ``alpha02``."""
        nodes = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes)
        return re.split(r"[\s,]", nodes.strip(), maxsplit=1)[0]

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        per_node = self.processes_per_node()
        nodes = require_number("SLURM_NNODES", self.variables, default=num_nodes)
        remedy = (
            "Give `#SBATCH --ntasks-per-node` the number of devices and `--nodes` the number of nodes, and start the "
            "script with srun; or, to let Treadle start the processes, pass plugins=LightningEnvironment()."
        )
        if per_node is None:
            self.check_count(num_devices, num_nodes, "SLURM", remedy)
        elif per_node != num_devices:
            raise MisconfigurationException(
                f"devices={num_devices}, but SLURM started {per_node} tasks on each node. {remedy}"
            )
        if nodes != num_nodes:
            raise MisconfigurationException(f"num_nodes={num_nodes}, but the SLURM job has {nodes} nodes. {remedy}")

    def processes_per_node(self) -> int | None:
        if self.variables.get("SLURM_NNODES") == "1":
            return self.world_size()
        value = self.variables.get("SLURM_NTASKS_PER_NODE", "")
        return int(value) if value.isdecimal() else None
