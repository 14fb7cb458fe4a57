"""The SLURM job around a process: the signal that announces its end, and how it is queued again.

A process may be in a job without being a rank of srun's: one of torchrun's or mpirun's, or one that a batch script
starts. Environments ask here for what all processes of a job share.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping

from treadle_fabric.errors import RequeueError

__all__ = ["INTERACTIVE_JOB_NAMES", "job_to_requeue", "requeue", "signal_of_job"]

INTERACTIVE_JOB_NAMES = ("bash", "interactive")
_ATTEMPTS = 3
_PAUSE_S = 1.0
_PATIENCE_S = 30.0


def signal_of_job(environ: Mapping[str, str]) -> int:
    """Return SIGUSR1 in a SLURM job, with which ``#SBATCH --signal=SIGUSR1@90`` announces the end; else 0.

    A process that does not take the signal dies of it.
    """
    return int(getattr(signal, "SIGUSR1", 0)) if "SLURM_JOB_ID" in environ else 0


def job_to_requeue(environ: Mapping[str, str]) -> str:
    """Return the name that ``scontrol requeue`` knows the batch job of this process by, ``12`` or ``12_3`` in an array.

    Empty outside of a job, and in an interactive job, which cannot be queued again.
    """
    if environ.get("SLURM_JOB_NAME") in INTERACTIVE_JOB_NAMES:
        return ""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID", "")


def requeue(job: str) -> None:
    """Have SLURM stop a job and queue it again: ``scontrol requeue JOB``, up to three times where it fails.

    One process of the job calls this, after all others have written what they have to: SLURM kills them then.

    Args:
        job: As ``ClusterEnvironment.job_to_requeue`` names it.

    Raises:
        RequeueError: There is no ``scontrol`` on the PATH, or SLURM refused.
    """
    said = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S)  # the controller may be busy: all jobs that end at this hour ask it
        try:
            done = subprocess.run(
                ["scontrol", "requeue", job], capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S
            )
        except FileNotFoundError:
            raise _not_requeued(
                job,
                "the command scontrol is not on the PATH" + _in_container(),
                "Make it visible to the script, or have the batch script call it where srun ends with status 143",
            ) from None
        except subprocess.TimeoutExpired:
            said = f"no answer within {_PATIENCE_S:g} s"
        except OSError as error:
            said = str(error)
        else:
            if done.returncode == 0:
                return
            said = f"exit status {done.returncode}, {(done.stderr.strip() or done.stdout.strip() or 'no message')!r}"
    raise _not_requeued(
        job,
        f"`scontrol requeue {job}` failed {_ATTEMPTS} times ({said})",
        "Where SLURM forbids it for the job, submit the job with `#SBATCH --requeue`",
    )


def _not_requeued(job: str, why: str, remedy: str) -> RequeueError:
    return RequeueError(
        f"SLURM job {job} was not queued again: {why}. {remedy}. By hand: `scontrol requeue {job}`, where the job has "
        "not ended yet; a new job needs ckpt_path."
    )


def _in_container() -> str:
    return " of this container" if os.path.exists("/.dockerenv") or "APPTAINER_CONTAINER" in os.environ else ""
