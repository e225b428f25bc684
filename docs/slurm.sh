#!/bin/bash
# A run on several hosts under SLURM: sbatch docs/slurm.sh --depth 16 --run NAME ...
# Start it in a clone that all hosts see, with the environment that has torch.
#SBATCH --job-name=nanofuse
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --signal=TERM@300
set -euo pipefail

# Rank 0, on the first host, serves the store through which the ranks find each other.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# Each task sees all GPUs of its host and takes the one of its local rank. The ranks end each other,
# with the error of the first to fail on top; SLURM is not to be quicker. Five minutes before the
# time limit it sends SIGTERM: the step ends, is saved, and --resume goes on.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python -m train.run "$@"' rank "$@"
