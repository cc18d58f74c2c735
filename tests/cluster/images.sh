#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds docker/Dockerfile and trains on two containers of it through docker/compose.yaml, from nothing: a
# base image made here, wheels fetched by this machine's pip, a Docker engine of its own.
#
#     sudo bash tests/cluster/images.sh
#
# The engine has its own data, process and mount namespaces, the containers' one its own network too: nothing of
# this machine's is used or changed, and all ends with this script. Kept: .cache/images, the base image and the
# wheels. About 9 minutes on 2 cores.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
readonly CACHE=.cache/images
readonly IMAGE=flora-dist:cpu
readonly PYTHON=${PYTHON:-python3}
# The containers' user, who must own the ssh keys, and whom this machine need not have.
readonly USER_ID=12345

say() {
    printf '%4d s  %s\n' "$SECONDS" "$*"
}

fail() {
    printf '\nimages.sh: FAILED after %d s: %s\n' "$SECONDS" "$*" >&2
    exit 1
}

require_tools() {
    local missing=() program
    local -A package=([mmdebstrap]=mmdebstrap [dockerd]=docker.io [docker-compose]=docker-compose
        [openssl]=openssl [ssh-keygen]=openssh-client [unshare]=util-linux [iptables]=iptables)
    for program in "${!package[@]}"; do
        command -v "$program" >/dev/null || missing+=("${package[$program]}")
    done
    if ((EUID != 0 || ${#missing[@]})); then
        printf 'images.sh: must be root and have its tools; uid %d, missing: %s. Run:\n    %s\n' "$EUID" "${missing[*]:-nothing}" \
            "sudo apt-get install -y ${missing[*]:-bash} && sudo bash tests/cluster/images.sh" >&2
        exit 2
    fi
}

work=$(mktemp -d /tmp/flora-images.XXXXXX)
readonly work
# shellcheck source=tests/cluster/images_engine.sh
source tests/cluster/images_engine.sh
# shellcheck source=tests/cluster/images_build.sh
source tests/cluster/images_build.sh
# shellcheck source=tests/cluster/images_train.sh
source tests/cluster/images_train.sh

finish() {
    local code=$?
    trap - EXIT INT TERM
    stop_engine
    [[ -z ${wheel_server-} ]] || kill "$wheel_server" 2>/dev/null || true
    rm -rf "$work"
    ((code)) || say 'all passed'
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

require_tools
mkdir -p "$CACHE"
say "on $(nproc) cores of '$(sed -n 's/^model name.*: //p;T;q' /proc/cpuinfo)', $(date -u +%F)"
make_base_image
fetch_wheels
build_image
check_image
start_nodes
check_nodes
check_training
check_lost_nodes
stop_nodes
