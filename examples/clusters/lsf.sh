#!/bin/bash
#BSUB -J regression
#BSUB -nnodes 2
#BSUB -W 120
#BSUB -o regression.%J.log
#BSUB -wa TERM -wt 2                 # SIGTERM 2 minutes before the end: save, and end with status 143
#BSUB -Q "143"                       # queue a job again that ended so

set -euo pipefail

# One resource set on each host, with 4 tasks and 4 GPUs: --devices and --nodes say the same.
# exec: LSF's signal reaches jsrun, which passes it on, and the job has the status of jsrun.
exec jsrun --nrs 2 --rs_per_host 1 --tasks_per_rs 4 --gpu_per_rs 4 --cpu_per_rs ALL_CPUS \
    python train.py --devices 4 --nodes 2 --root runs/regression
