# Sourced by torchrun.sh, mpirun.sh and srun.sh: which Python, which options, how many threads. No site's facts: what a
# cluster needs (modules, NCCL_SOCKET_IFNAME, ...) is exported before, or at the top of a job script. Over several nodes:
# where a node's own name leads to 127.0.0.1 or 127.0.1.1 (Debian), or to another network than that between the nodes, export
# GLOO_SOCKET_IFNAME, the interface by which the others reach it (ip -brief address shows them), and MASTER_ADDR, rank 0's
# address there.
#
# All three launchers take the same arguments, launcher options first:
#
#   launch/X.sh [-n RANKS] [--nodes NODES] [COMMAND] CONFIG.toml [--set section.key=value ...] [--resume ...]
#
#   -n RANKS        ranks in total (or the environment's RANKS; default one a GPU, else one a node)
#   --nodes NODES   nodes (or the environment's NODES; default 1, under Slurm what was allocated)
#   COMMAND         run (default), check, finetune, dynamics, attribute build, attribute query, sketch-check,
#                   intrinsic-dimension: what python -m hpc_hess takes
#
# The exit code is the program's: 0 done, 2 bad input, 3 numerics, 75 stopped early (the same command goes on), 1 other.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=${VENV:-$root/.venv}/bin/python
    [ -x "$PYTHON" ] || PYTHON=$(command -v python3 || true)
fi
[ -x "$PYTHON" ] || { echo "${0##*/}: no Python: run launch/setup.sh, or export PYTHON" >&2; exit 2; }

ranks=${RANKS:-} nodes=${NODES:-}
while [ $# -gt 0 ]; do
    case $1 in
    -n | --nodes)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { echo "${0##*/}: $1 takes a positive number, not '${2:-}'" >&2; exit 2; }
        [ "$1" = -n ] && ranks=$2 || nodes=$2
        shift 2
        ;;
    -h | --help) sed -n '7,16s/^# \{0,1\}//p' "$root/launch/env.sh"; exit 0 ;;
    --) shift; break ;;
    -*) echo "${0##*/}: unknown option '$1' before the configuration: -n RANKS or --nodes NODES" >&2; exit 2 ;;
    *) break ;;
    esac
done
case ${1:-} in
run | check | finetune | dynamics | sketch-check | intrinsic-dimension) command=("$1"); shift ;;
attribute) command=("$1" "${2:-}"); shift $(($# > 1 ? 2 : 1)) ;;
*) command=(run) ;;
esac
[ $# -gt 0 ] || { echo "usage: ${0##*/} [-n RANKS] [--nodes NODES] [COMMAND] CONFIG.toml [--set section.key=value ...]" >&2; exit 2; }

# this machine's GPUs, as far as this job may see them
count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c . || true
    else
        echo 0
    fi
}

# default_ranks NODES: one rank a GPU, without GPUs one a node
default_ranks() {
    local gpus
    gpus=$(count_gpus)
    echo $(($1 * (gpus > 0 ? gpus : 1)))
}

# use_threads LOCAL_RANKS: this machine's cores shared by its ranks, unless OMP_NUM_THREADS says otherwise
use_threads() {
    local cores
    cores=$(env -u OMP_NUM_THREADS nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
}

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # this clone's program, installed or not
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

# forward SIGNAL COMMAND...: run it and return its exit code. A request to stop (TERM, USR1) reaches it as SIGNAL; the ranks
# then commit and end by themselves. INT and HUP end it.
forward() {
    local stop=$1 child code again=yes
    shift
    "$@" &
    child=$!
    trap 'again=yes; kill -$stop $child 2>/dev/null' TERM USR1
    trap 'again=yes; kill -TERM $child 2>/dev/null' INT HUP
    while [ -n "$again" ]; do # a trapped signal ends a wait, not the command
        again='' code=0
        wait "$child" || code=$?
    done
    trap - TERM INT HUP USR1
    return "$code"
}
