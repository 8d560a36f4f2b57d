#!/usr/bin/env bash
# Start a SLURM of one node, run a command on it, and stop it:
#
#     tests/cluster/slurm.sh COMMAND…      exits with COMMAND's status
#
# COMMAND finds sbatch, srun and so on in its PATH, and SLURM_CONF set. Needs root. Installs slurm-wlm and munge by apt if
# they are missing. All files lie in a temporary folder, which is kept if SLURM does not start.
set -euo pipefail

[ $# -gt 0 ] || { sed -n '2,7s/^# \?//p' "$0"; exit 2; }
[ "$(id -u)" = 0 ] || { echo "slurm.sh: needs root, as slurmd starts jobs in the name of users" >&2; exit 2; }
if ! { command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } >/dev/null; then
    command -v apt-get >/dev/null || { echo "slurm.sh: no SLURM here, and no apt-get to install it with" >&2; exit 2; }
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
fi

# If this script runs in a SLURM job itself, jobs and sbatch would inherit that job's settings.
unset "${!SLURM_@}" "${!SBATCH_@}" "${!SRUN_@}" "${!SALLOC_@}" "${!SUBMITIT_@}"

folder=$(mktemp -d "${TMPDIR:-/tmp}/salve-slurm.XXXXXX")
chmod 755 "$folder"
export SLURM_CONF=$folder/slurm.conf
daemons=()
up=

down() {
    status=$?
    trap - EXIT INT TERM
    if [ -n "$up" ]; then
        scancel --quiet --user="$(id -un)" 2>/dev/null || true
        for _ in $(seq 100); do [ -z "$(squeue --noheader 2>/dev/null)" ] && break; sleep 0.1; done
    fi
    # munge last: the controller needs it to stop.
    for pid in "${daemons[@]}"; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    if [ -n "$up" ]; then rm -rf "$folder"; else echo "slurm.sh: its logs are in $folder" >&2; fi
    exit "$status"
}
trap down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

host=$(hostname -s)
port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
cat >"$SLURM_CONF" <<CONF
ClusterName=salve
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(port)
SlurmdPort=$(port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
MailProg=/bin/true
# Find the processes of a job by their parents: containers often have no cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Four cores and 4 GB, whatever the machine has, because the tests need jobs that run side by side.
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=${SALVE_SLURM_KILL_WAIT:-5}
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=4096 State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
mkdir "$folder/state" "$folder/spool"
(umask 077 && head -c 256 /dev/urandom >"$folder/munge.key")

# Daemons have their own sessions, so that a Ctrl-C for COMMAND does not reach them.
setsid munged --foreground --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --seed-file="$folder/munge.seed" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" >/dev/null 2>&1 &
munged=$!
daemons=("$munged")
for _ in $(seq 50); do [ -S "$folder/munge.socket" ] && break; sleep 0.1; done
setsid slurmctld -D >/dev/null 2>&1 &
daemons=("$!" "$munged")
setsid slurmd -D -N "$host" >/dev/null 2>&1 &
daemons=("$!" "${daemons[@]}")

for _ in $(seq 300); do
    if [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; then up=yes; break; fi
    for pid in "${daemons[@]}"; do
        kill -0 "$pid" 2>/dev/null || { echo "slurm.sh: a daemon did not stay up" >&2; exit 1; }
    done
    sleep 0.1
done
[ -n "$up" ] || { echo "slurm.sh: the node is not idle after 30 s" >&2; exit 1; }

status=0
SALVE_SLURM=1 "$@" || status=$?
exit "$status"
