#!/usr/bin/env bash
# A Slurm of N nodes on this one machine, for tests and laptops (root; loopback only).
#
#   slurm/local_cluster.sh up N      start it (nothing happens where the same cluster already runs)
#   eval "$(slurm/local_cluster.sh env)"   let sbatch, srun, squeue in this shell talk to it
#   slurm/local_cluster.sh status | down
#
# Each node is a slurmd with a host name, a PMIx directory and an /etc/hosts of its own, 8 GPUs that are only
# counted, and as many CPUs as a script may ask for; all share this machine's cores. Nothing outside the state
# directory is written.  HPC_HESS_SLURM_DIR and HPC_HESS_SLURM_PORT move the state and the ports. The directory holds the
# cluster's key, and programs that root runs read it: it must be root's own, with mode 700, where no one else can replace it.
set -euo pipefail

dir=${HPC_HESS_SLURM_DIR:-/run/hpc-hess-slurm}
port=${HPC_HESS_SLURM_PORT:-17000}
export SLURM_CONF=$dir/etc/slurm.conf

say() { echo "local_cluster: $*" >&2; }
die() { say "$*"; exit 1; }

# secure: end here unless the state directory is root's own alone, and so are those above it (but for those such as /tmp, in
# which no one can move what is another's)
secure() {
    [[ $dir = /* && $dir != *[[:space:]]* ]] || die "HPC_HESS_SLURM_DIR should be an absolute path without blanks, not '$dir'"
    [ -d "$dir" ] && [ ! -L "$dir" ] && [ "$(stat -c '%u %a' "$dir")" = '0 700' ] ||
        die "$dir is not a directory of root's own with mode 700: remove it, or choose another HPC_HESS_SLURM_DIR"
    local above=$dir mode
    while [ "$above" != / ]; do
        above=$(dirname "$above")
        mode=$(stat -L -c '%a' "$above")
        [ "$(stat -L -c '%u' "$above")" = 0 ] && { (( (8#$mode & 8#022) == 0 )) || (( 8#$mode & 8#1000 )); } ||
            die "others than root can replace $dir, because of $above: choose another HPC_HESS_SLURM_DIR"
    done
}

# is PID PROGRAM: that process runs and is that program (not another one that got its number, not a zombie)
is() { [ "$(cat "/proc/${1:-none}/comm" 2>/dev/null)" = "$2" ] && ! grep -q '^State:.[ZX]' "/proc/$1/status" 2>/dev/null; }

# alive NAME PROGRAM: the process of the pid file runs
alive() { is "$(cat "$dir/run/$1.pid" 2>/dev/null)" "$2"; }

stop() {
    local pid
    pid=$(cat "$dir/run/$1.pid" 2>/dev/null) && is "$pid" "$2" || return 0
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 100); do is "$pid" "$2" || return 0; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
}

need() {
    local missing=()
    for program in munged slurmctld slurmd sbatch unshare; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    [ ${#missing[@]} -eq 0 ] || die "missing: ${missing[*]}; install them (Debian, Ubuntu: apt-get install slurm-wlm munge)"
    [ "$(id -u)" = 0 ] || die "needs root, to give each node a host name of its own: sudo slurm/local_cluster.sh $*"
}

write_configuration() {
    local nodes=$1 host cpus memory
    host=$(hostname -s)
    cpus=${HPC_HESS_SLURM_CPUS:-64} # more than there are, so that any script can be submitted
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    mkdir -p "$dir"/{etc,log,run,munge,state,spool}
    if [ ! -s "$dir/munge/key" ]; then
        (umask 077; head -c 1024 /dev/urandom >"$dir/munge/key")
    fi
    # cred_expire: a requeued job starts that much later (default 120 s)
    cat >"$dir/etc/slurm.conf" <<CONF
ClusterName=hpc_hess_local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
KillWait=10
SlurmdTimeout=60
InactiveLimit=0
SchedulerParameters=batch_sched_delay=1,sched_interval=5,bf_interval=5
NodeName=node[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1))-$((port + nodes)) CPUs=$cpus RealMemory=$memory Gres=gpu:8 State=UNKNOWN
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=YES:16 State=UP
CONF
    [ "$nodes" -gt 1 ] || sed -i "s/node\[1-1\]/node1/; s/Port=$((port + 1))-$((port + 1))/Port=$((port + 1))/" "$dir/etc/slurm.conf"
    mkdir -p "$dir/gpus" && touch "$dir/gpus/"{0..7} # empty files: Slurm counts only GPUs that are files
    echo "Name=gpu File=$dir/gpus/[0-7]" >"$dir/etc/gres.conf"
    echo "PMIxCliTmpDirBase=$dir/pmix" >"$dir/etc/mpi.conf"
    echo "CgroupAutomount=no" >"$dir/etc/cgroup.conf"
    {
        echo "127.0.0.1 localhost $host"
        for i in $(seq "$nodes"); do echo "127.0.0.1 node$i"; done
    } >"$dir/etc/hosts"
    echo "$nodes" >"$dir/nodes"
}

start_node() {
    local name=$1
    alive "$name" slurmd && return 0
    mkdir -p "$dir/spool/$name" "$dir/pmix"
    unshare --mount --uts --propagation private sh -c '
        hostname "$1" && mount -t tmpfs none "$2/pmix" && mount --bind "$2/etc/hosts" /etc/hosts && exec slurmd -N "$1"
    ' sh "$name" "$dir" </dev/null >>"$dir/log/$name.out" 2>&1 || die "slurmd of $name did not start: see $dir/log/$name.log"
}

up() {
    local nodes=$1
    [[ $nodes =~ ^[1-9][0-9]?$ ]] || die "up N: N is a number of nodes from 1 to 99, not '$nodes'"
    need up "$nodes"
    mkdir -p "$(dirname "$dir")"
    mkdir -m 700 "$dir" 2>/dev/null || true # secure says what is wrong
    secure
    if [ "$(cat "$dir/nodes" 2>/dev/null || echo 0)" != "$nodes" ]; then
        down
        rm -rf "$dir/state"
    fi
    alive slurmctld slurmctld || write_configuration "$nodes"
    if ! alive munged munged; then
        rm -f "$dir/munge/socket"*
        # --force: everybody should reach the socket, it says; here all are root
        munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/run/munged.pid" \
            --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" --num-threads=2 >>"$dir/log/munged.out" 2>&1 ||
            die "munged did not start: see $dir/log/munged.log"
    fi
    alive slurmctld slurmctld || slurmctld >>"$dir/log/slurmctld.out" 2>&1 ||
        die "slurmctld did not start: see $dir/log/slurmctld.log"
    for i in $(seq "$nodes"); do start_node "node$i"; done
    for _ in $(seq 300); do
        [ "$(sinfo -h -t idle,mixed,allocated -o %D 2>/dev/null | awk '{n += $1} END {print n + 0}')" = "$nodes" ] && break
        sleep 0.2
    done
    sinfo -h -o '%D %T' >&2
    [ "$(sinfo -h -t idle,mixed,allocated -o %D | awk '{n += $1} END {print n + 0}')" = "$nodes" ] ||
        die "not every node came up within a minute: see $dir/log"
    say "$nodes nodes are up; in this shell: eval \"\$(slurm/local_cluster.sh env)\""
}

down() {
    [ -e "$dir" ] || [ -L "$dir" ] || return 0
    secure
    if alive slurmctld slurmctld; then
        timeout 10 scancel --user=root 2>/dev/null || true
        for _ in $(seq 50); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.2; done
    fi
    local file
    for file in "$dir"/run/node*.pid; do
        [ -e "$file" ] && stop "$(basename "$file" .pid)" slurmd
    done
    stop slurmctld slurmctld
    stop munged munged
    rm -f "$dir/nodes"
}

case ${1:-} in
up) up "${2:-2}" ;;
down) down ;;
status)
    [ ! -e "$dir" ] || secure
    [ -e "$dir/nodes" ] && alive slurmctld slurmctld || die "not running"
    sinfo
    squeue
    ;;
env)
    [ ! -e "$dir" ] || secure
    echo "export SLURM_CONF=$SLURM_CONF"
    ;;
*) die "usage: slurm/local_cluster.sh up N | down | status | env" ;;
esac
