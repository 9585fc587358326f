#!/usr/bin/env bash
# Start a run under torchrun: launch/torchrun.sh [-n RANKS] CONFIG.toml [--set ...]; the arguments are those of env.sh.
#
# Several nodes: the same command on each, with MASTER_ADDR (a name or address of the first that the others reach),
# NODE_RANK (0, 1, ...) and, where 29500 is taken, MASTER_PORT:
#   MASTER_ADDR=first NODE_RANK=1 launch/torchrun.sh -n 16 --nodes 2 CONFIG.toml
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

nodes=${nodes:-1}
ranks=${ranks:-$(default_ranks "$nodes")}
[ $((ranks % nodes)) = 0 ] || { echo "torchrun.sh: $ranks ranks do not divide over $nodes nodes" >&2; exit 2; }
if [ "$nodes" = 1 ]; then
    rendezvous=(--standalone)
else
    [ -n "${MASTER_ADDR:-}" ] && [ -n "${NODE_RANK:-}" ] ||
        { echo "torchrun.sh: --nodes $nodes needs MASTER_ADDR and, on each node, its NODE_RANK" >&2; exit 2; }
    rendezvous=(--nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
use_threads $((ranks / nodes))
exec "$PYTHON" "$root/launch/torchrun.py" "${rendezvous[@]}" --nproc-per-node $((ranks / nodes)) -m hpc_hess "${command[@]}" "$@"
