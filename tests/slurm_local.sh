#!/usr/bin/env bash
# A real Slurm on one machine: munged, slurmctld and a slurmd for each of two nodes, all started
# here and not by systemd, all of whose files are in $SLURM_LAB.
#   tests/slurm_local.sh install    get Slurm with apt-get; exit code 1, with a sentence, if it cannot be
#   tests/slurm_local.sh up         start; then `export SLURM_CONF=$SLURM_LAB/slurm.conf`
#   tests/slurm_local.sh down       end the daemons that were started, by their pids
# A file $SLURM_LAB/plant.node1 with lines `export NAME=value` sets the environment of the steps on
# node1, as a broken installation would; not of batch scripts, who hand theirs on to all nodes.
set -euo pipefail
ROOT=${SLURM_LAB:-/tmp/slurm-lab}
NODES=(node1 node2)
CPUS=${CPUS:-2}
PORT=${SLURM_PORT:-16817} # of slurmctld; the nodes take the next ones
DAEMONS=(munged slurmctld slurmd)

missing() { for d in "${DAEMONS[@]}"; do command -v "$d" >/dev/null || return 0; done; return 1; }

install() {
  missing || return 0
  local apt=(apt-get)
  [ "$(id -u)" = 0 ] || apt=(sudo -n apt-get)
  export DEBIAN_FRONTEND=noninteractive
  "${apt[@]}" update -qq && "${apt[@]}" install -y -qq --no-install-recommends \
    munge slurmctld slurmd slurm-client >/dev/null || true
  if missing; then
    echo "Slurm cannot be installed here: it needs Debian or Ubuntu, a network, and root or sudo" >&2
    return 1
  fi
} 2>&1

configure() {
  cat > "$ROOT/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$ROOT/munge/socket,cred_expire=5
CryptoType=crypto/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool.%n
SlurmctldPidFile=$ROOT/slurmctld.pid
SlurmdPidFile=$ROOT/slurmd.%n.pid
SlurmctldLogFile=$ROOT/slurmctld.log
SlurmdLogFile=$ROOT/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog=$ROOT/task_prolog
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
MailProg=/bin/true
KillWait=5
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=30
CONF
  for i in "${!NODES[@]}"; do
    echo "NodeName=${NODES[i]} NodeHostname=$(hostname -s) NodeAddr=127.0.0.1" \
      "Port=$((PORT + 1 + i)) CPUs=$CPUS State=UNKNOWN" >> "$ROOT/slurm.conf"
  done
  cat >> "$ROOT/slurm.conf" <<CONF
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=off
CONF
  cat > "$ROOT/task_prolog" <<PROLOG
#!/bin/sh
[ -z "\$SLURM_STEP_ID" ] || cat "$ROOT/plant.\$SLURMD_NODENAME" 2>/dev/null || true
PROLOG
  chmod +x "$ROOT/task_prolog"
}

up() {
  mkdir -p "$ROOT/state" "$ROOT/munge"
  chmod 755 "$ROOT" "$ROOT/munge"
  dd if=/dev/urandom of="$ROOT/munge/key" bs=128 count=1 status=none
  chmod 400 "$ROOT/munge/key"
  configure
  munged --key-file="$ROOT/munge/key" --socket="$ROOT/munge/socket" --num-threads=2 \
    --pid-file="$ROOT/munged.pid" --log-file="$ROOT/munge/log" --seed-file="$ROOT/munge/seed"
  export SLURM_CONF=$ROOT/slurm.conf
  slurmctld -c </dev/null
  for node in "${NODES[@]}"; do
    mkdir -p "$ROOT/spool.$node"
    slurmd -N "$node" </dev/null
  done
  for _ in $(seq 150); do
    [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = ${#NODES[@]} ] && return 0
    sleep .2
  done
  tail -n 20 "$ROOT"/*.log >&2
  return 1
}

running() { # a process that is not a zombie, and one of ours: its id may have been given anew
  grep -qE "$(IFS='|'; echo "${DAEMONS[*]}")" "/proc/$1/comm" 2>/dev/null &&
    ! grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null
}

stop() { # TERM, after ten seconds KILL
  local pid
  for file in "$@"; do
    pid=$(cat "$file" 2>/dev/null) || continue
    running "$pid" || continue
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 100); do running "$pid" || continue 2; sleep .1; done
    kill -9 "$pid" 2>/dev/null || true
  done
}

down() {
  export SLURM_CONF=$ROOT/slurm.conf
  scancel -u "$(id -un)" 2>/dev/null || true
  for _ in $(seq 150); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep .1; done
  stop "$ROOT"/slurmd.*.pid "$ROOT/slurmctld.pid" "$ROOT/munged.pid"
}

case ${1:-} in
  install | up | down) "$1" ;;
  *) echo "usage: $0 install | up | down" >&2; exit 2 ;;
esac
