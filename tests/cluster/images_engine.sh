# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# A Docker engine that ends with the script that sources this file, and takes all it made with it.
# Needs $work, a folder, and `fail`.
: "${work:?}"

engine=''
# The distribution's client builds with secrets; one that comes first on the path may lack the plugin for that.
DOCKER=docker
[[ ! -x /usr/bin/docker ]] || DOCKER=/usr/bin/docker
readonly DOCKER

# start_engine NETWORK OPTION...: NETWORK is `own`, or `shared` with this machine for builds that download.
# Own namespaces for mounts and processes: killing the first process ends engine and containers, and the kernel takes
# down the mounts. The containers' own network: no bridge, address or firewall rule comes to this machine.
start_engine() {
    local network=(--net) log=$work/dockerd.log
    [[ $1 == own ]] || network=()
    shift
    # --oom-score-adjust and --default-ulimit: in a container engines may not lower the one and raise the others.
    unshare "${network[@]}" --mount --pid --fork --kill-child --mount-proc bash -euc '
        mount -t tmpfs tmpfs /run
        ip link set lo up
        exec dockerd "$@"' dockerd \
        --data-root "$work/docker" --exec-root /run/docker --pidfile /run/docker.pid --host "unix://$work/docker.sock" \
        --cgroup-parent "/flora-images-$$" --oom-score-adjust 0 --default-ulimit nofile=16384:16384 \
        --log-level warn "$@" >>"$log" 2>&1 &
    engine=$!
    export DOCKER_HOST=unix://$work/docker.sock DOCKER_CONFIG=$work DOCKER_BUILDKIT=1 COMPOSE_PROJECT_NAME=flora
    for _ in {1..100}; do
        "$DOCKER" version >/dev/null 2>&1 && return
        kill -0 "$engine" 2>/dev/null || break
        sleep 0.2
    done
    tail -n 20 "$log" >&2
    fail 'the Docker engine must start, and did not; its last lines are above.'
}

stop_engine() {
    [[ -n $engine ]] || return 0
    # unshare does not hand signals on; the engine is its only child.
    pkill -TERM -P "$engine" 2>/dev/null || true
    for _ in {1..100}; do
        kill -0 "$engine" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL "$engine" 2>/dev/null || true
    wait "$engine" 2>/dev/null || true
    engine=''
    rm -f "$work/docker.sock"
    # The kernel keeps control groups, empty ones too.
    find /sys/fs/cgroup -depth -type d -path "*/flora-images-$$*" -exec rmdir {} + 2>/dev/null || true
}

# The distribution's client builds with secrets; others on the path may lack the plugin for that.
