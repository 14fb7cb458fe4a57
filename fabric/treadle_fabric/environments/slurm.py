"""Processes started by srun in a SLURM job."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Mapping

from treadle_fabric.environments.environment import (
    Finding,
    StartedEnvironment,
    list_variables,
    pick,
    refuse_ranks_beyond,
    require_number,
    require_port,
)
from treadle_fabric.environments.slurm_job import INTERACTIVE_JOB_NAMES, job_to_requeue
from treadle_fabric.errors import MisconfigurationException

__all__ = ["SLURMEnvironment", "srun_step"]

_FIRST_SPECIAL_STEP = 4294967280  # SLURM numbers the interactive, batch and extern steps from here on
_STEP = ("SLURM_STEP_ID", "SLURM_STEPID")
# What a step says comes first: it may have fewer tasks and nodes than its job, whose variables it inherits.
_TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
_JOB = ("SLURM_JOB_ID", "SLURM_JOB_NAME")
_RANKS = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
_REMEDY = (
    "Give `#SBATCH --ntasks-per-node` the number of devices and `--nodes` the number of nodes, and start the script "
    "with srun; or, to let Treadle start the processes, pass plugins=LightningEnvironment()."
)


class SLURMEnvironment(StartedEnvironment):
    """Processes started by ``srun``, one for each device.

    Args:
        auto_requeue: Whether the Trainer, when the job's time is nearly up, saves ``hpc_ckpt_N.ckpt`` and has SLURM
            queue the job again (``scontrol requeue``), which then goes on from there by itself. SLURM has to send a
            signal before the end: ``#SBATCH --signal=SIGUSR1@90``. Without, the signal is not taken. Default: True.
        requeue_signal: The signal that announces the end. Default: SIGUSR1.
    """

    collects_output = True

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | None = None) -> None:
        self.auto_requeue = auto_requeue
        if requeue_signal is None and hasattr(signal, "SIGUSR1"):
            requeue_signal = signal.SIGUSR1
        self.requeue_signal = requeue_signal

    @property
    def main_address(self) -> str:
        address = self.variables.get("MASTER_ADDR")
        if address is None:
            nodes = next((self.variables[name] for name in _NODE_LISTS if self.variables.get(name)), "127.0.0.1")
            address = self.resolve_root_node_address(nodes)
        return address

    @property
    def main_port(self) -> int:
        if "MASTER_PORT" in self.variables:
            return require_port(self.variables)
        # All ranks know the numbers of job and step, by which two jobs on one machine differ, and two steps of a job.
        job, step = self.variables.get("SLURM_JOB_ID", ""), srun_step(self.variables) or 0
        return 15000 + (int(job) + 101 * step) % 10000 if job.isdecimal() else 29500

    @staticmethod
    def examine(environ: Mapping[str, str] | None = None) -> Finding:
        """Return whether srun started this process, and by which variables that was decided.

        What an srun step says wins over what was inherited from the job, its name included. Processes of the batch
        script, of salloc's shell, and of a shell that ``srun --pty`` started are none of srun's ranks.
        """
        environ = os.environ if environ is None else environ
        found = pick((*_JOB, *_STEP, *_TASKS[:2], *_RANKS[:2]), environ)
        if not found:
            return Finding(False, found, "No variable of SLURM is set.")
        tasks = _first(_TASKS, environ)
        if srun_step(environ) is None and not pick(("SLURM_JOB_ID", "SLURM_JOBID", *_STEP), environ):
            # Some of a job's variables, handed on into a container for example: ranks are all that they can tell of.
            ranks = "SLURM_NTASKS" in environ and environ.get("SLURM_JOB_NAME") not in INTERACTIVE_JOB_NAMES
            return Finding(ranks, found, f"Variables of SLURM {'with' if ranks else 'without'} ranks, and of no job.")
        if srun_step(environ) is None:
            step = list_variables(pick(_STEP, environ)) or "SLURM_STEP_ID is not set"
            reason = f"srun did not start this process ({step}): it belongs to the batch script, or to salloc's shell."
            counted = _first(_TASKS[1:], environ)
            job = f"the job's count of tasks ({list_variables(pick(_TASKS[1:2], environ))})"
            note = f"{reason} So {job} is not followed. For one process a task, start the script with `srun python ...`"
            alone = counted is None or environ[counted].strip() == "1"
            return Finding(False, found, reason, "" if alone else f"{note}.", _warn_of_srun(environ))
        missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if name not in environ]
        if tasks is None or missing:
            missing = missing or ["SLURM_STEP_NUM_TASKS"]
            reason = f"srun sets {', '.join(missing)}, too."
            return Finding(False, found, reason, f"The variables of SLURM are not followed: {reason}")
        if environ[tasks].strip() == "1" and (
            "SLURM_PTY_PORT" in environ or environ.get("SLURM_JOB_NAME") in INTERACTIVE_JOB_NAMES
        ):
            return Finding(False, found, "This process belongs to a shell that srun started as its only task.")
        reason = f"srun started this process as rank {environ['SLURM_PROCID']} of {environ[tasks]}."
        return Finding(True, found, reason, warning=_warn_of_tasks(environ, environ[tasks].strip()))

    @staticmethod
    def job_name() -> str | None:
        """Return the job's name; None outside a job."""
        return os.environ.get("SLURM_JOB_NAME")

    @staticmethod
    def job_id() -> int | None:
        """Return the job's number; None in an interactive job, and outside a job."""
        if SLURMEnvironment.job_name() in INTERACTIVE_JOB_NAMES:
            return None
        try:
            return int(os.environ["SLURM_JOB_ID"])
        except (KeyError, ValueError):
            return None

    def world_size(self) -> int:
        return require_number(_first(_TASKS, self.variables) or "SLURM_NTASKS", self.variables, minimum=1)

    def global_rank(self) -> int:
        return require_number("SLURM_PROCID", self.variables)

    def local_rank(self) -> int:
        return require_number("SLURM_LOCALID", self.variables)

    def node_rank(self) -> int:
        return require_number("SLURM_NODEID", self.variables)

    def announcing_signal(self) -> int:
        """Return the number of ``requeue_signal`` with ``auto_requeue``, else 0."""
        return int(self.requeue_signal or 0) if self.auto_requeue else 0

    def job_to_requeue(self) -> str:
        return job_to_requeue(self.variables) if self.auto_requeue else ""

    @staticmethod
    def resolve_root_node_address(nodes: str) -> str:
        """Return the first host of a list as SLURM writes it: ``alpha[02-04,7],beta`` gives ``alpha02``."""
        nodes = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes)
        return re.split(r"[\s,]", nodes.strip(), maxsplit=1)[0]

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        nodes, counts = self._nodes(), self._tasks_per_node()
        per_node = self.processes_per_node()
        if counts is not None and len(set(counts)) > 1:
            raise MisconfigurationException(
                f"SLURM started {', '.join(map(str, counts))} tasks on the {len(counts)} nodes, and each node needs "
                f"the same number. {_REMEDY}"
            )
        self._check_variables(nodes)
        if per_node is None:
            self.check_count(num_devices, num_nodes, "SLURM", _REMEDY)
        elif per_node != num_devices:
            raise MisconfigurationException(
                f"devices={num_devices}, but SLURM started {per_node} tasks on each node. {_REMEDY}"
            )
        if nodes is not None and nodes != num_nodes:
            what = "step" if "SLURM_STEP_NUM_NODES" in self.variables else "job"
            raise MisconfigurationException(f"num_nodes={num_nodes}, but the SLURM {what} has {nodes} nodes. {_REMEDY}")

    def _check_variables(self, nodes: int | None) -> None:
        """Refuse variables that contradict one another: ranks beyond their counts, and counts that do not multiply."""
        counted = (("SLURM_PROCID", _first(_TASKS, self.variables)), ("SLURM_NODEID", _first(_NODES, self.variables)))
        components = self.variables.get("SLURM_HET_SIZE", "1")
        who = "srun" if components == "1" else f"srun, in a heterogeneous job of {components} components, each of"
        refuse_ranks_beyond([(rank, count) for rank, count in counted if count], self.variables, who)
        here, local = self.processes_per_node(), self.local_rank() if "SLURM_LOCALID" in self.variables else 0
        if here is not None and local >= here:
            raise MisconfigurationException(
                f"SLURM_LOCALID={local}, but there are {here} tasks on the node, which are numbered from 0. {_REMEDY}"
            )
        per_node, tasks = self.variables.get("SLURM_NTASKS_PER_NODE", ""), self.world_size()
        if "SLURM_STEP_NUM_TASKS" in self.variables or nodes is None or not per_node.isdecimal():
            return  # what a step says counts, and it inherits the number per node of its job
        if tasks != nodes * int(per_node):
            said = list_variables(pick((_first(_TASKS, self.variables) or "", "SLURM_NTASKS_PER_NODE"), self.variables))
            raise MisconfigurationException(
                f"{said}, but {nodes} nodes with {per_node} tasks each are {nodes * int(per_node)} tasks. Give "
                "`--ntasks-per-node` and `--nodes`, and leave `--ntasks` out: SLURM computes it."
            )

    def processes_per_node(self) -> int | None:
        counts = self._tasks_per_node()
        if counts is not None:
            node = require_number("SLURM_NODEID", self.variables, default=0)
            return counts[min(node, len(counts) - 1)]
        nodes = self._nodes()
        if nodes == 1:
            return self.world_size()
        value = self.variables.get("SLURM_NTASKS_PER_NODE", "")
        # It is the job's: a step with another number of tasks inherits it.
        fits = value.isdecimal() and nodes in (None, self.world_size() / max(1, int(value)))
        return int(value) if fits else None

    def evidence(self) -> dict[str, str]:
        counted = [name for name in (_first(_TASKS, self.variables), _first(_NODES, self.variables)) if name]
        lists = [name for name in (_first(_NODE_LISTS, self.variables),) if name]
        met = ("MASTER_ADDR", "MASTER_PORT")
        return pick((*_JOB, *_STEP[:1], *counted, "SLURM_STEP_TASKS_PER_NODE", *_RANKS, *lists, *met), self.variables)

    def explain_ranks(self, world_size: int) -> str:
        said = list_variables(pick((_first(_TASKS, self.variables) or "SLURM_NTASKS",), self.variables))
        started = "srun started" if srun_step(self.variables) is not None else "there are"
        return (
            f"{said} says that {started} {world_size} processes. In a batch script, and in the shell of salloc, start "
            "the script with `srun python ...`; if Treadle is to start the processes, pass "
            "plugins=LightningEnvironment()."
        )

    def _nodes(self) -> int | None:
        name = _first(_NODES, self.variables)
        return None if name is None else require_number(name, self.variables)

    def _tasks_per_node(self) -> list[int] | None:
        """The number of tasks on each node of the step; None where SLURM does not tell."""
        text = self.variables.get("SLURM_STEP_TASKS_PER_NODE", "")
        if not text and "SLURM_STEP_NUM_TASKS" not in self.variables:  # the job's, which is the step's without a step
            text = self.variables.get("SLURM_TASKS_PER_NODE", "")
        counts: list[int] = []
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
            counts += [int(count)] * int(times or 1)
        return counts or None


def srun_step(environ: Mapping[str, str]) -> int | None:
    """Return the number of the srun step that this process belongs to; None outside of one.

    The interactive, the batch and the extern step of a job are none: SLURM starts them, once for the job or the node.
    """
    name = _first(_STEP, environ)
    step = "" if name is None else environ[name].strip()
    return int(step) if step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP else None


def _warn_of_srun(environ: Mapping[str, str]) -> str:
    """Warn where a batch script has srun at hand, and starts the program without it; empty otherwise."""
    if not job_to_requeue(environ) or shutil.which("srun", path=environ.get("PATH", "")) is None:
        return ""
    nodes = environ.get(_first(_NODES, environ) or "", "1").strip()
    more = "" if nodes == "1" else f" The job has {nodes} nodes, and only the first one works."
    return (
        "The `srun` command is available on your system but is not used: SLURM's tasks are not the ranks, and Treadle"
        f" starts the processes of devices= on this machine.{more} For one process a task, start the script with"
        " `srun python ...`."
    )


def _warn_of_tasks(environ: Mapping[str, str], tasks: str) -> str:
    """Warn where SLURM was left to share out the tasks over the nodes, or ranks count within a component only."""
    if environ.get("SLURM_HET_SIZE", "1") != "1":
        return (
            f"This is a component of a heterogeneous job (SLURM_HET_SIZE={environ['SLURM_HET_SIZE']}), and the ranks "
            "of a run are those of one component. Start the training as a step of one: `srun --het-group=0 python ...`."
        )
    one_node = environ.get(_first(_NODES, environ) or "", "").strip() == "1"
    if tasks == "1" or one_node or "SLURM_NTASKS_PER_NODE" in environ:
        return ""
    return (
        f"--ntasks={tasks} is set, and --ntasks-per-node is not: SLURM shares the tasks out over the nodes as it "
        "likes, and a run needs the same number on each. Give `#SBATCH --ntasks-per-node` the number of devices, and "
        "leave --ntasks out."
    )


def _first(names: tuple[str, ...], environ: Mapping[str, str]) -> str | None:
    """Return the first of the names that is set and not empty; None if none is."""
    return next((name for name in names if environ.get(name)), None)
