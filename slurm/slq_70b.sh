#!/usr/bin/env bash
# The Hessian spectrum of a 70 B model on 8 nodes of 8 GPUs, for as many allocations as it takes.
#
#   sbatch slurm/slq_70b.sh                                    from the root of the clone
#   sbatch --nodes=16 --time=12:00:00 slurm/slq_70b.sh         any #SBATCH line gives way to the command line
#   sbatch slurm/slq_70b.sh CONFIG.toml --set lanczos.steps=40
#   CONFIG=my.toml sbatch slurm/slq_70b.sh --set ...
#   PLAN=h100 sbatch slurm/slq_70b.sh                          first plans the run on these GPUs (names, or a file: hpc-hess
#                                                              plan --help), and ends if it cannot fit
#
# Before the time limit Slurm signals this script; the ranks finish the step under way if it fits (else they give it up, or
# keep a part of it: store.checkpoint_every), commit and exit with code 75; the job puts itself back into the queue and
# goes on from there. A node that fails loses the step under way and the one before it at most.
#
#SBATCH --job-name=slq_70b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# 300 s before the limit, to this script only (B:); a step may take longer: then --signal=B:USR1@SECONDS
#SBATCH --signal=B:USR1@300
set -euo pipefail

home=${HPC_HESS_HOME:-${SLURM_SUBMIT_DIR:-$PWD}} # this file itself is a copy in Slurm's spool
[ -x "$home/launch/srun.sh" ] || { echo "submit from the root of the clone, or export HPC_HESS_HOME (not $home)" >&2; exit 2; }
config=${CONFIG:-$home/launch/configs/slq_70b.toml}
case ${1:-} in '' | -*) ;; *) config=$1; shift ;; esac

# What your cluster needs goes here: module load ..., export NCCL_SOCKET_IFNAME=..., source another environment.

if [ -n "${PLAN:-}" ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    python=${PYTHON:-${VENV:-$home/.venv}/bin/python}
    settings=() last=''
    for word in "$@"; do [ "$last" != --set ] || settings+=(--set "$word"); last=$word; done
    PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH} "$python" -m hpc_hess plan "$config" "${settings[@]}" --gpu "$PLAN" \
        --nodes "$SLURM_JOB_NUM_NODES" --gpus-per-node "${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
fi

echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), nodes $SLURM_JOB_NODELIST: $config $*"
"$home/launch/srun.sh" "$config" "$@" &
step=$!
again=yes ended=''
trap 'again=yes; echo "the time limit is near: asking the ranks to stop"; kill -USR1 $step' USR1
trap 'again=yes; ended=yes; kill -USR1 $step' TERM # cancelled, or past the limit: Slurm ends the job
while [ -n "$again" ]; do                         # a signal ends a wait, not the step
    again='' code=0
    wait "$step" || code=$?
done
trap '' USR1 TERM

if [ "$code" = 75 ]; then
    if [ -n "$ended" ]; then
        echo "stopped early because Slurm ended the job: submit again to go on" >&2
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-1000}" ]; then
        echo "stopped early and restarted $SLURM_RESTART_COUNT times already (MAX_RESTARTS): submit again to go on" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
        trap 'exit 75' TERM # Slurm ends this script and starts it again
        sleep 60 &
        wait $!
    else
        echo "stopped early and could not be requeued: submit again to go on" >&2
    fi
fi
exit "$code"
