#!/usr/bin/env bash
# One point of a scaling study for each task of a job array; each goes on where it was stopped.
#
#   sbatch --array=0-7 --nodes=8 slurm/scaling_study.sh STUDY.toml     points 0 to 7 (python -m hpc_hess scaling run says how many)
#   python -m hpc_hess scaling fit runs/study/* --out runs/scaling     afterwards, anywhere
#
# Ask for as many nodes as the largest point needs; with launcher = "srun" a point takes its ranks of them.
#
#SBATCH --job-name=scaling
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=02:00:00
#SBATCH --output=%x-%A_%a.out
set -euo pipefail

home=${HPC_HESS_HOME:-${SLURM_SUBMIT_DIR:-$PWD}} # this file itself is a copy in Slurm's spool
[ -x "$home/launch/srun.sh" ] || { echo "submit from the root of the clone, or export HPC_HESS_HOME (not $home)" >&2; exit 2; }
[ $# = 1 ] || { echo "usage: sbatch --array=0-N slurm/scaling_study.sh STUDY.toml" >&2; exit 2; }

# What your cluster needs goes here: module load ..., export NCCL_SOCKET_IFNAME=...

python=${PYTHON:-$home/.venv/bin/python}
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m hpc_hess scaling run "$1" --point "${SLURM_ARRAY_TASK_ID:?submit as an array: --array=0-N}"
