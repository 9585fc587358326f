#!/usr/bin/env bash
# The demo (SmolLM2-135M, 2 ranks, no GPU needed) as a batch job: sbatch slurm/slq_smollm2.sh [CONFIG.toml] [--set ...].
# GPUs: sbatch --gpus-per-node=2 slurm/slq_smollm2.sh. It goes on after the time limit as slq_70b.sh does.
#
#SBATCH --job-name=slq_smollm2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

home=${HPC_HESS_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
CONFIG=${CONFIG:-$home/launch/configs/smollm2.toml}
. "$home/slurm/slq_70b.sh"
