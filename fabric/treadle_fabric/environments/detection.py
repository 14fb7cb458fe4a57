"""Find out what started this process: which of the environment variables describe it, and which it only inherited."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Mapping
from typing import NamedTuple

from treadle_fabric.environments.environment import (
    ClusterEnvironment,
    Finding,
    StartedEnvironment,
    list_variables,
    pick,
)
from treadle_fabric.environments.kubeflow import KubeflowEnvironment
from treadle_fabric.environments.local import LightningEnvironment
from treadle_fabric.environments.lsf import LSFEnvironment
from treadle_fabric.environments.mpi import MPIEnvironment
from treadle_fabric.environments.slurm import SLURMEnvironment
from treadle_fabric.environments.taken import describing_variables, taken_by
from treadle_fabric.environments.torchelastic import TorchElasticEnvironment
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.rank_zero import rank_zero_only

__all__ = ["Detection", "detect", "detect_environment", "examine_all", "refuse_contradiction"]

_Kind = type[StartedEnvironment]
# torchrun comes first because it also runs inside SLURM and LSF jobs.
_KINDS: tuple[_Kind, ...] = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)
_RANKS = (
    *("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"),
    *("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
)


class Detection(NamedTuple):
    """What started this process."""

    environment: ClusterEnvironment
    reason: str
    """A sentence for the user."""
    notes: tuple[str, ...] = ()
    """What to tell the user of variables that are set and not followed."""
    warnings: tuple[str, ...] = ()
    """What is probably a mistake in how the processes were started."""


def detect_environment(environ: Mapping[str, str] | None = None) -> ClusterEnvironment:
    """Detect the environment of this process: Ray Train, torchrun, SLURM, LSF, MPI, or none of them.

    Args:
        environ: The environment variables to decide by. Default: those of this process.
    """
    return detect(environ).environment


def detect(environ: Mapping[str, str] | None = None, pid: int | None = None) -> Detection:
    """Detect the environment of this process, and say why.

    Where several programs started one another, the environment is that of the innermost one: torchrun in an srun step,
    mpirun in a SLURM or LSF job, srun in either where SLURM_TASK_PID names this process; and Ray Train in all of them,
    whose workers inherit the variables of what started Ray. A process that inherited the
    variables of a rank of Treadle's, because the rank started it, is no rank. Then, where ``environ`` is not given,
    these variables are removed from those of this process, so that nothing else follows them, and nothing that
    this process starts.

    Args:
        environ: The environment variables to decide by. Default: those of this process.
        pid: The id of the process. Default: this one's.
    """
    pid = os.getpid() if pid is None else pid
    variables = os.environ if environ is None else environ
    owner = None if getattr(multiprocessing.current_process(), "_inheriting", False) else taken_by(variables, pid)
    inherited: tuple[str, ...] = ()
    if owner is not None:
        inherited = _drop(environ, owner)
        if environ is not None:
            environ = {name: value for name, value in environ.items() if name not in describing_variables(environ)}
        variables = os.environ if environ is None else environ
    kind, finding = _innermost(variables, pid)
    told = [finding] if kind is not None else _others(variables)
    warnings = tuple(each.warning for each in told if each.warning)
    notes = tuple(each.note for each in told if each.note and not each.warning)
    environment: ClusterEnvironment = LightningEnvironment() if kind is None else kind()
    environment.environ = environ
    return Detection(environment, finding.reason, inherited + notes, warnings)


def refuse_contradiction(environment: ClusterEnvironment, environ: Mapping[str, str] | None = None) -> None:
    """Refuse an environment that the user chose, where another program started this process with another rank.

    Args:
        environment: What the user chose. One of the user's own, and LightningEnvironment, are taken as they are.
        environ: The environment variables to decide by. Default: those of this process.

    Raises:
        MisconfigurationException: The ranks differ, so that two processes would have the same one.
    """
    if type(environment) not in (*_KINDS, KubeflowEnvironment):
        return
    variables = os.environ if environ is None else environ
    kind, finding = _innermost(variables, os.getpid())
    if kind is None or isinstance(environment, kind):
        return
    other, chosen = kind(), type(environment).__name__
    other.environ = environ
    try:
        theirs, mine = ((e.global_rank(), e.world_size()) for e in (other, environment))
    except MisconfigurationException:  # a variable is missing or malformed: that is said when it is used
        return
    if theirs != mine:
        raise MisconfigurationException(
            f"plugins={chosen}() says rank {mine[0]} of {mine[1]} ({list_variables(environment.evidence())}), but "
            f"{finding.reason} Leave out plugins={chosen}(): {kind.__name__} is detected."
        )


def examine_all(environ: Mapping[str, str] | None = None) -> dict[type[ClusterEnvironment], Finding]:
    """Return, of each environment that Treadle knows, whether its variables describe this process, and why."""
    findings: dict[type[ClusterEnvironment], Finding] = {}
    others: list[type[StartedEnvironment | LightningEnvironment]] = [KubeflowEnvironment, LightningEnvironment]
    kinds = [_ray(), *_KINDS, *others]
    for kind in kinds:
        try:
            findings[kind] = kind.examine(environ)
        except MisconfigurationException as e:
            findings[kind] = Finding(False, {}, str(e))
    return findings


def _ray() -> _Kind:
    """RayEnvironment, which few programs need."""
    kind: _Kind = importlib.import_module("treadle_fabric.environments.ray").RayEnvironment
    return kind


def _innermost(environ: Mapping[str, str], pid: int) -> tuple[_Kind | None, Finding]:
    if "ray.train" in sys.modules and (finding := _ray().examine(environ)).applies:
        return _ray(), finding
    if environ.get("SLURM_TASK_PID") == str(pid) and (finding := SLURMEnvironment.examine(environ)).applies:
        return SLURMEnvironment, finding
    for kind in _KINDS:
        finding = kind.examine(environ)
        if finding.applies:
            if kind in (SLURMEnvironment, LSFEnvironment) and (inner := _mpirun_inside(kind(), environ)) is not None:
                return MPIEnvironment, inner
            return kind, finding
    return None, LightningEnvironment.examine(environ)


def _mpirun_inside(outer: ClusterEnvironment, environ: Mapping[str, str]) -> Finding | None:
    """What mpirun says, where it started the process in the job; srun and jsrun set some of MPI's variables, too.

    srun and jsrun, where they started the process, and MPI's variables give it the same rank. Where mpirun did, it
    used srun at most to start its own helpers, one on each machine, whose variables the process inherited.
    """
    try:
        finding = MPIEnvironment.examine(environ)
        mpi = MPIEnvironment()
        mpi.environ = outer.environ = environ
        agrees = mpi.agrees_with(outer.world_size(), outer.global_rank())
    except MisconfigurationException:  # a variable is malformed: the outer environment says so when it is used
        return None
    return finding if finding.applies and not agrees else None


def _others(environ: Mapping[str, str]) -> list[Finding]:
    """What the environments say that do not apply."""
    kinds: list[_Kind] = [*_KINDS, KubeflowEnvironment]
    return [kind.examine(environ) for kind in kinds]


def _drop(environ: Mapping[str, str] | None, owner: int) -> tuple[str, ...]:
    """Remove the variables of another process's rank, if they are this process's own; returns what to tell the user."""
    variables = os.environ if environ is None else environ
    names = describing_variables(variables)
    told = list_variables(pick(_RANKS, variables))
    if environ is None:
        for name in names:
            del os.environ[name]
        rank_zero_only.rank = 0  # type: ignore[attr-defined]  # what was read from these variables on import
    if not told:  # of a run of one process, which is no matter to the user
        return ()
    return (
        f"This process is no rank of the run that started it. The rank that its environment variables name ({told}) is "
        f"process {owner}, from which it inherited them. They are not followed here.",
    )
