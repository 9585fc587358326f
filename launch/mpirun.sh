#!/usr/bin/env bash
# Start a run under Open MPI's mpirun: launch/mpirun.sh [-n RANKS] CONFIG.toml [--set ...]; the arguments are those of
# env.sh. Several nodes: MPIRUN_ARGS="--hostfile FILE --map-by ppr:8:node" launch/mpirun.sh -n 16 --nodes 2 CONFIG.toml
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

command -v mpirun >/dev/null || { echo "mpirun.sh: there is no mpirun: run launch/setup.sh --mpi, or load a module" >&2; exit 2; }
nodes=${nodes:-1}
ranks=${ranks:-$(default_ranks "$nodes")}
use_threads $(((ranks + nodes - 1) / nodes))
arguments=(--quiet -n "$ranks" --bind-to none --oversubscribe)
for name in PYTHONPATH OMP_NUM_THREADS PYTHONUNBUFFERED TOKENIZERS_PARALLELISM; do arguments+=(-x "$name"); done
for name in $(compgen -e HF_) $(compgen -e TRANSFORMERS_OFFLINE); do arguments+=(-x "$name"); done # where the Hub's cache lies, ...
[ "$(id -u)" != 0 ] || arguments+=(--allow-run-as-root)
code=0
# USR1: mpirun passes it on to the ranks; at TERM it would end them
# shellcheck disable=SC2086  # several words on purpose
forward USR1 mpirun "${arguments[@]}" ${MPIRUN_ARGS:-} "$PYTHON" -m hpc_hess "${command[@]}" "$@" || code=$?
# --quiet hides mpirun's page about ranks that ended with a code, and its line about ranks that could not say why
[ "$code" -le 128 ] || echo "hpc-hess: error: a rank was ended by SIG$(kill -l $((code - 128)))" >&2
exit "$code"
