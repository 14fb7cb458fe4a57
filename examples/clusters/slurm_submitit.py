"""The same job, submitted from Python by submitit, which queues it again itself.

python examples/clusters/slurm_submitit.py --nodes 2 --devices 4              # on a login node of the cluster
python examples/clusters/slurm_submitit.py --cluster debug --epochs 2         # in this process, to try the script
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from treadle_fabric import SLURMEnvironment


class Training:
    """What submitit pickles and calls in each task; ``checkpoint`` says that it may be called again."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments, self.folder = arguments, os.path.dirname(os.path.abspath(__file__))

    def __call__(self) -> int:
        sys.path.insert(0, self.folder)
        import train  # the script beside this one

        # submitit has SLURM send SIGUSR2. Treadle saves, and then calls submitit's own handler, which queues the job
        # again, with the same number: auto_resume goes on from what was saved.
        in_slurm = "SLURM_JOB_ID" in os.environ
        plugin = SLURMEnvironment(requeue_signal=signal.SIGUSR2) if in_slurm else None
        return train.main(train.parse(self.arguments), plugins=plugin)

    def checkpoint(self) -> object:
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(given: argparse.Namespace) -> None:
    import submitit

    executor = submitit.AutoExecutor(folder="submitit/%j", cluster=given.cluster)
    executor.update_parameters(name="regression", nodes=given.nodes, tasks_per_node=given.devices, timeout_min=24 * 60)
    if given.cluster is None:
        executor.update_parameters(
            gpus_per_node=given.devices, cpus_per_task=8, slurm_signal_delay_s=90, slurm_additional_parameters={}
        )
    arguments = [f"--devices={given.devices}", f"--nodes={given.nodes}", f"--epochs={given.epochs}"]
    job = executor.submit(Training(arguments))
    print(f"job {job.job_id}")
    if given.cluster is not None:
        print(f"trained to step {job.result()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", choices=["local", "debug"], default=None, help="default: SLURM")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=10)
    submit(parser.parse_args())
