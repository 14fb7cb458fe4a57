"""Whose the rank is that the environment variables name: this process's, or that of one which started it.

A script that a rank starts, an evaluation for example, inherits the rank's variables. It is no rank, and would wait for
the others. So a process that takes a rank leaves a mark in its environment, with its process id and a fingerprint of
the variables; a process that finds the mark of another one, with the same variables, has only inherited them.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, MutableMapping

__all__ = ["describing_variables", "mark_rank_as_taken", "taken_by"]

_MARK = "TREADLE_RANK_TAKEN_BY"
# What tells one process from the others; each program that starts ranks sets some of them for each.
_TELLING = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID"),
    *("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "PMIX_NAMESPACE", "JSM_NAMESPACE_RANK"),
)
# What describes a process as a rank. A SLURM job's own variables stay: they are right in every process of the job.
_DESCRIBING = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TREADLE_LAUNCH_DIR", _MARK),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_TASK_PID"),
)
_DESCRIBING_PREFIXES = (
    *("TORCHELASTIC_", "SLURM_STEP", "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MV2_COMM_WORLD_", "JSM_NAMESPACE_"),
    "TREADLE_RUN_",  # the options of `treadle-fabric run`
)


def mark_rank_as_taken(environ: MutableMapping[str, str] | None = None, pid: int | None = None) -> None:
    """Note in the environment variables that this process is the rank that these name.

    Args:
        environ: Default: those of this process.
        pid: Default: this process's id.
    """
    environ = os.environ if environ is None else environ
    environ[_MARK] = f"{os.getpid() if pid is None else pid} {_fingerprint(environ)}"


def taken_by(environ: Mapping[str, str] | None = None, pid: int | None = None) -> int | None:
    """Return the id of the process whose rank the variables name, where this one only inherited them; else None.

    Args:
        environ: Default: those of this process.
        pid: Default: this process's id.
    """
    environ = os.environ if environ is None else environ
    owner, _, fingerprint = environ.get(_MARK, "").partition(" ")
    if not owner.isdecimal() or int(owner) == (os.getpid() if pid is None else pid):
        return None
    return int(owner) if fingerprint == _fingerprint(environ) else None


def describing_variables(environ: Mapping[str, str]) -> list[str]:
    """Return the names of those variables that describe a process as a rank."""
    return [name for name in environ if name in _DESCRIBING or name.startswith(_DESCRIBING_PREFIXES)]


def _fingerprint(environ: Mapping[str, str]) -> str:
    return f"{zlib.crc32(repr([environ.get(name) for name in _TELLING]).encode()):08x}"
