#!/usr/bin/env bash
# Run a command next to a SLURM of two nodes, n1 and n2, on this machine, which ends with it.
#
#   tools/with_slurm.sh FOLDER COMMAND [ARGS...]
#
# All it writes is in FOLDER, logs included; what an earlier call has left there is removed. For SLURM
# each node has 4 CPUs and 4 GPUs.
set -euo pipefail
PATH=$PATH:/usr/sbin

if [ $# -lt 2 ]; then
    echo "usage: $0 FOLDER COMMAND [ARGS...]" >&2
    exit 2
fi
if [ -e "$1" ] && [ ! -e "$1/slurm.conf" ]; then
    echo "$1 is there already, and not from this command: name another folder" >&2
    exit 2
fi
rm -rf "$1"
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
mkdir -m 700 "$folder/munge" "$folder/ctld" "$folder/n1" "$folder/n2"
host=$(hostname -s)
read -r control one two < <(python3 -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))')

cat > "$folder/slurm.conf" << EOF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$control
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
# As with cgroups, and unlike with linuxproc, a signal to a task is not one to all below it.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
# A machine that is busy with trainings answers late.
MessageTimeout=60
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0
# The CPUs and GPUs below are what it says, whatever the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
StateSaveLocation=$folder/ctld
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$one CPUs=4 Gres=gpu:4
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$two CPUs=4 Gres=gpu:4
PartitionName=test Nodes=n1,n2 Default=YES State=UP
EOF
touch "$folder"/gpu{0,1,2,3}
echo "NodeName=n[1-2] Name=gpu File=$folder/gpu[0-3]" > "$folder/gres.conf"
export SLURM_CONF=$folder/slurm.conf TEST_SLURM=1

daemons=()
others() ( # what SLURM started, by what it inherits: not the daemons and the controller's helper
    mark=SLURM_CONF=$SLURM_CONF
    unset SLURM_CONF
    for file in $(grep -lsz "^$mark$" /proc/[0-9]*/environ); do
        name=$(cat "${file%environ}comm" 2> /dev/null)
        [[ $name =~ ^(munged|slurmctld|slurmscriptd|slurmd|)$ ]] || basename "${file%/*}"
    done
)
stop() {
    set +o errexit +o pipefail
    timeout 20 scancel --quiet --user="$(id -un)"
    for _ in $(seq 40); do # SLURM itself has KillWait, 30 s, for what does not end
        left=$(others)
        [ "$left" ] || break
        sleep 1
    done
    xargs --no-run-if-empty kill -KILL <<< "$left"
    kill "${daemons[@]}"
    wait "${daemons[@]}"
}
trap stop EXIT

start() { # in the foreground of a child, so that `stop` sees its end
    "$@" >> "$folder/$1.out" 2>&1 &
    daemons+=($!)
}
failed() {
    echo "SLURM has not started: $1. What its daemons said is in $folder" >&2
    exit 1
}
munge=$folder/munge
mungekey --create --keyfile="$munge/key"
# --force, because it would have every user reach its socket, and this may be in somebody's home.
start munged --foreground --force --socket="$munge/socket" --key-file="$munge/key" \
    --pid-file="$munge/pid" --seed-file="$munge/seed" --log-file="$munge/log"
until [ -S "$munge/socket" ]; do
    kill -0 $! 2> /dev/null || failed "$(tail -n 1 "$folder/munged.out")"
    sleep 0.1
done
start slurmctld -D -c
start slurmd -D -N n1 -c
start slurmd -D -N n2 -c
until idle=$(timeout 10 sinfo --noheader --format=%D --states=idle 2>&1) && [ "$idle" = 2 ]; do
    [ "$SECONDS" -lt 120 ] || failed "$idle"
    sleep 0.1
done
"$@"
