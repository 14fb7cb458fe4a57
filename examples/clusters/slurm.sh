#!/bin/bash
#SBATCH --job-name=regression
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4          # one task for each device: --devices below
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8            # the workers of the loaders, too
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@90          # 90 s before the end: save, and queue the job again
#SBATCH --requeue                    # allow that, where the cluster's default forbids it
#SBATCH --open-mode=append           # the job that was queued again goes on in the same log
#SBATCH --output=%x-%j.log

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

srun python train.py --devices 4 --nodes "$SLURM_NNODES" --root runs/regression
