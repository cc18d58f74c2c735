# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Part of check.sh: what the tests on several hosts (marker `cluster`) need of the machine. Sourced after _common.sh.

# PROGRAM PACKAGE, Debian's and Ubuntu's names. Slurm's daemons need no munge and no service manager here.
readonly HOST_TOOLS='
unshare util-linux
ip iproute2
iptables iptables
ssh openssh-client
/usr/sbin/sshd openssh-server
pkill procps
pdsh pdsh
mpirun openmpi-bin
srun slurm-client
slurmctld slurmctld
slurmd slurmd
'

# missing_packages: those whose program is not there, in one line.
missing_packages() {
    local program package
    while read -r program package; do
        [[ -z $program ]] || command -v "$program" >/dev/null || printf '%s ' "$package"
    done <<<"$HOST_TOOLS"
}

can_make_hosts() {
    unshare --net --uts --mount --ipc --pid --fork true 2>/dev/null
}

# prepare_hosts: installs what is missing where it may; 1 where the tests on several hosts cannot run, after
# saying why and how they can.
prepare_hosts() {
    local missing
    missing=$(missing_packages)
    if [[ -n $missing && $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
        say "installing $missing"
        # A package must not start its daemon here: the tests' hosts have their own.
        apt-get update -qq
        # shellcheck disable=SC2086  # several words
        DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends $missing >/dev/null
        missing=$(missing_packages)
    fi
    if [[ -n $missing ]]; then
        say "LEFT OUT: tests on several hosts; they need $missing. Run as root, or:" \
            "sudo apt-get install -y $missing; then: sudo ./launch/check.sh -m cluster"
        return 1
    fi
    if ! can_make_hosts; then
        say 'LEFT OUT: tests on several hosts; they need the right to make namespaces. Run:' \
            'sudo ./launch/check.sh -m cluster (in a container: one started with --privileged)'
        return 1
    fi
}
