#!/usr/bin/env bash
# SLURM and munge from the system's packages where they are missing, for tools/with_slurm.sh.
set -euo pipefail

packages=(slurm-wlm slurm-client munge)
PATH=$PATH:/usr/sbin
missing=()
for command in munged mungekey slurmctld slurmd sbatch; do
    command -v "$command" > /dev/null || missing+=("$command")
done
if [ ${#missing[@]} = 0 ]; then
    exit
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "not here: ${missing[*]}. As root, on Debian or Ubuntu:" \
        "apt-get install --no-install-recommends ${packages[*]}" >&2
    exit 1
fi
echo "installing ${packages[*]} ..."
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --no-install-recommends "${packages[@]}" > /dev/null
