#!/bin/sh
# Sees to the engines that `make test-engines` runs beside Ray: Debian's SLURM, munge, nginx and Caddy,
# installed by apt-get where one is missing. Without one of them its tests are skipped, with a line.
set -u
missing=
for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge nginx:nginx-light caddy:caddy; do
    PATH="$PATH:/usr/sbin" command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair##*:}"
done
[ -z "$missing" ] && exit 0
if ! command -v apt-get >/dev/null; then
    echo "not here, and no apt-get to install it:$missing" >&2
    exit 0
fi
if [ "$(id -u)" = 0 ]; then
    as_root=
elif sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    echo "not here; as root or with sudo: apt-get update && apt-get install$missing" >&2
    exit 0
fi
# Debian starts what it installs; the tests start their own, on loopback and ports of their own.
echo "installing$missing; where Debian starts them as services, stop those that are not wanted"
$as_root apt-get update -q && DEBIAN_FRONTEND=noninteractive $as_root apt-get install -q -y --no-install-recommends $missing || exit 0
