#!/bin/bash
# One run of `meshlm train` over the nodes of a SLURM job. Fill in what is in <angle brackets>.
#
#   sbatch train-slurm.sh
#
# JAX reads SLURM's own variables: a task is a process, and has the GPU of its local number. --run,
# --data and the environment lie on a file system that all nodes see.
#
# Five minutes before the time limit, or when the job is preempted, SLURM sends SIGTERM to every
# task; they save one step and exit with 75, and the job goes back into the queue. When a node
# fails, --requeue puts it there. The same command then goes on from the newest checkpoint.
#SBATCH --job-name=meshlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=meshlm-%j.log

set -u
MOST_RESTARTS=100

# The tasks end each other when one fails, and each says why; srun is not to end them at the first
# code 75, for the others are still saving. One that hangs two minutes after the first is killed.
srun --kill-on-bad-exit=0 --wait=120 <environment>/bin/meshlm train \
    --run=<shared folder>/runs/first \
    --data=<shared folder>/store \
    --preset=gpt-j-6b \
    --batch-size=64 \
    --mesh.data=16
code=$?

# 75: stopped by SIGTERM, saved. Anything else that is not 0 is for a person to look at.
if [ "$code" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MOST_RESTARTS" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
