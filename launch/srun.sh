#!/usr/bin/env bash
# Start a run with srun, inside an allocation or not: launch/srun.sh [-n RANKS] [--nodes NODES] CONFIG.toml [--set ...]; the
# arguments are those of env.sh. Further options of srun: SRUN_ARGS="--partition=P --gpus-per-node=8".
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

command -v srun >/dev/null || { echo "srun.sh: there is no srun: this is not a Slurm machine" >&2; exit 2; }
arguments=(--kill-on-bad-exit=1 --export=ALL)
[ -z "${SLURM_STEP_ID:-}" ] || arguments+=(--overlap) # in a shell that is a step itself, and holds what it was given
[ -z "$nodes" ] || arguments+=(--nodes "$nodes")
if [ -n "$ranks" ]; then
    arguments+=(--ntasks "$ranks")
    [ -z "$nodes" ] || [ $((ranks % nodes)) != 0 ] || arguments+=(--ntasks-per-node $((ranks / nodes)))
elif [ -z "${SLURM_NTASKS:-}" ] && [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    arguments+=(--ntasks-per-node "$SLURM_GPUS_ON_NODE")
fi
# MPI ranks for parallel HDF5: PMIx where this Slurm has it
for kind in $(srun --mpi=list 2>&1); do
    case $kind in pmix | pmix_v*) arguments+=("--mpi=$kind"); break ;; esac
done
# a job's cores per task are not inherited by its steps (Slurm 22.05 and later)
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# srun ends the other ranks when one ends with a code, then returns theirs (143): the first code is in its messages
codes=$(mktemp)
trap 'rm -f "$codes"' EXIT
note_codes() {
    trap '' INT TERM HUP USR1
    local line
    while IFS= read -r line || [ -n "$line" ]; do
        printf '%s\n' "$line" >&2
        [[ $line =~ ^srun:\ error:\ .*Exited\ with\ exit\ code\ ([0-9]+) ]] && echo "${BASH_REMATCH[1]}" >>"$codes"
    done
}
code=0
exec 3>&2 2> >(note_codes)
filter=$!
# USR1: srun passes it on to the ranks; at TERM it would end them
# shellcheck disable=SC2086  # several words on purpose
forward USR1 srun "${arguments[@]}" ${SRUN_ARGS:-} "$PYTHON" -m hpc_hess "${command[@]}" "$@" || code=$?
exec 2>&3 3>&-
wait "$filter" || true
# a rank that only lost the others ends with 1: another code says why
if [ "$code" != 0 ] && [ -s "$codes" ]; then
    code=$(grep -m 1 -vx 1 "$codes" || echo 1)
fi
exit "$code"
