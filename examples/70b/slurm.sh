#!/usr/bin/env bash
#SBATCH --job-name=tar-70b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
# sbatch slurm.sh config.yaml /shared/runs/tar-70b
# Five minutes before the end of its time Slurm says SIGTERM: the run saves and ends, and the next job goes on from there.
set -euo pipefail
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29500}"
srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m fastguard immunize "$1" --out "$2"
