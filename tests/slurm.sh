#!/bin/bash
# A private one-node Slurm for the tests, in a folder of its own (as root; Debian 12 or Ubuntu).
#
#   tests/slurm.sh start DIR   installs what is missing, starts munged, slurmctld and slurmd,
#                              waits until the node is idle and prints "export SLURM_CONF=..."
#   tests/slurm.sh stop DIR    ends those three daemons; DIR stays, with the logs
#
# Both may be repeated. TANDEM_SLURM_CPUS (default: the machine's cores, at least 8) is what the
# node claims to have, so that `srun -n 4` runs at once on two cores. TANDEM_SLURM_GPUS are device files
# that the node hands out as `gres` of the kind gpu, in CUDA's order: "/dev/nvidia0 /dev/nvidia1".
set -euo pipefail

die() {
    echo "tests/slurm.sh: $*" >&2
    exit 1
}

[[ $# -eq 2 && $1 =~ ^(start|stop)$ ]] || die "usage: tests/slurm.sh start|stop DIR"
[[ $(id -u) -eq 0 ]] || die "slurmd starts tasks as their users: run this as root"
mkdir -p "$2"
dir=$(cd "$2" && pwd)
export SLURM_CONF=$dir/slurm.conf

install_packages() {
    local package missing=()
    # They may have been unpacked without being installed (tests/gpu_slurm.sh).
    if command -v slurmctld && command -v slurmd && command -v srun && command -v munged; then return; fi >/dev/null
    for package in slurmctld slurmd slurm-client munge; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' ||
            missing+=("$package")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    apt-get update -qq >&2
    # The MPI plugins are a package of their own in later releases.
    if apt-cache show slurm-wlm-mpi-plugins >/dev/null 2>&1; then
        missing+=(slurm-wlm-mpi-plugins)
    fi
    DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

in_use() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# The first of two free ports in a row, below the kernel's range for outgoing connections.
free_ports() {
    local i first
    first=$((17000 + $(echo "$dir" | cksum | cut -d' ' -f1) % 1000 * 2))
    for ((i = 0; i < 100; i++, first += 2)); do
        if ! in_use "$first" && ! in_use "$((first + 1))"; then
            echo "$first"
            return
        fi
    done
    die "no free port near $first"
}

# Slurm takes the number of a GPU from the end of its file's name, CUDA counts those that it sees: the files
# go by links that are numbered from 0.
write_gres() {
    local file n=0
    rm -rf "$dir/gpu" "$dir/gres.conf"
    [[ -n ${TANDEM_SLURM_GPUS:-} ]] || return 0
    mkdir "$dir/gpu"
    for file in $TANDEM_SLURM_GPUS; do
        ln -s "$file" "$dir/gpu/nvidia$n"
        n=$((n + 1))
    done
    printf '%s\n' AutoDetect=off "Name=gpu File=$dir/gpu/nvidia[0-$((n - 1))]" >"$dir/gres.conf"
    echo GresTypes=gpu >>"$SLURM_CONF"
    sed -i "s/^\(NodeName=.*\) State=/\1 Gres=gpu:$n State=/" "$SLURM_CONF"
}

write_config() {
    local host cores port
    host=$(hostname -s)
    cores=$(nproc)
    port=$(free_ports)
    mkdir -p "$dir/state" "$dir/spool"
    if [[ ! -s $dir/munge.key ]]; then
        (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    fi
    cat >"$SLURM_CONF" <<CONF
ClusterName=tandem
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=2
SchedulerParameters=sched_interval=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=${TANDEM_SLURM_CPUS:-$((cores > 8 ? cores : 8))} State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
    # Slurm looks for control groups even when no plugin asks for them, and containers have none to give: 22.05 wants systemd
    # where it finds version 2 of them, and takes version 1 on trust.
    local plugin=cgroup/v1
    [[ $(slurmd -V | grep -o '[0-9]*' | head -1) -lt 23 ]] || plugin=disabled
    echo "CgroupPlugin=$plugin" >"$dir/cgroup.conf"
}

# Whether the daemon whose id stands in DIR/$1.pid is alive and is that program. (One that has ended
# but that nobody has waited for, as in a container without an init, has no command line left.)
running() {
    local pid
    pid=$(cat "$dir/$1.pid" 2>/dev/null) && [[ -n $pid ]] &&
        [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$1" ]] &&
        grep -q . "/proc/$pid/cmdline"
}

not_running() { ! running "$1"; }

# wait_for SECONDS COMMAND...
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [[ $SECONDS -lt $end ]] || return 1
        sleep 0.1
    done
}

node_is_up() { sinfo -h -o %T | grep -Eq '^(idle|mixed|allocated)$'; }

stop() {
    local name
    for name in slurmd slurmctld munged; do
        if running "$name"; then
            kill "$(cat "$dir/$name.pid")"
            wait_for 10 not_running "$name" || kill -9 "$(cat "$dir/$name.pid")"
        fi
        rm -f "$dir/$name.pid"
    done
}

start() {
    install_packages
    if ! { running munged && running slurmctld && running slurmd && node_is_up; }; then
        stop
        write_config
        write_gres
        # The daemons outlive this script: they must not hold its output (a caller's pipe) open.
        munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" \
            --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" \
            --seed-file="$dir/munged.seed" >/dev/null 2>&1 || die "munged did not start, see $dir/munged.log"
        slurmctld -c -f "$SLURM_CONF" >/dev/null 2>&1 || die "slurmctld did not start, see $dir/slurmctld.log"
        slurmd -f "$SLURM_CONF" >/dev/null 2>&1 || die "slurmd did not start, see $dir/slurmd.log"
        wait_for 30 node_is_up ||
            die "the node did not come up ($(sinfo -h -o '%T %E' 2>&1 | head -1)): see $dir/slurmctld.log and $dir/slurmd.log"
    fi
    echo "export SLURM_CONF=$SLURM_CONF"
}

"$1"
