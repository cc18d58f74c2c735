#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Starts a container of the image: writes ~/.deepspeed_env from the container's environment, then becomes the
# command. The command `sshd` makes it a node that launchers reach:
#
#     entrypoint.sh sshd
#     entrypoint.sh torchrun --standalone --nproc-per-node 2 -m flora_dist.trainer --config configs/tiny.yaml
#
# Variables: FLORA_EXPORT, more names for ~/.deepspeed_env, separated by spaces; FLORA_SECRETS, the folder of the
# keys `client_key` and `host_key` (/run/secrets).

set -euo pipefail
export LC_ALL=C

# What training reads, and what a session that ssh opens does not have: the container's environment ends at its
# first program. No names that hold passwords: launchers put these values on command lines. PKEY, RKEY ... are
# InfiniBand's and no secrets.
readonly EXPORTED='PATH|PYTHONPATH|LD_LIBRARY_PATH|DS_ACCELERATOR|CUDA_HOME|CUDA_VISIBLE_DEVICES|PDSH_RCMD_TYPE'\
'|TORCH_EXTENSIONS_DIR|TORCH_DISTRIBUTED_DEBUG|TORCH_NCCL_[A-Z0-9_]+|(GLOO|NCCL|OMP|MKL)_[A-Z0-9_]+|OMPI_MCA_[A-Za-z0-9_]+'
readonly SECRET='TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|(^|_)(PASS|PWD|PW|CREDS?|JWT|PAT)(_|$)'\
'|(^|[^_LMPQR]|[^_][LMPQR])KEY|_KEY'
readonly PORT=2222

refuse() {
    printf 'entrypoint.sh: %s\n' "$*" >&2
    exit 2
}

# exported_names: the names, sorted, of what is set and not empty (the launchers cannot pass on an empty value).
exported_names() {
    local name
    for name in ${FLORA_EXPORT-}; do
        [[ -n ${!name-} ]] || refuse "FLORA_EXPORT must name variables that are set; '$name' is not. Set it or take it out."
        printf '%s\n' "$name"
    done
    compgen -e | grep -E -x "$EXPORTED" | { grep -E -i -v "$SECRET" || true; } | while read -r name; do
        [[ -z ${!name} ]] || printf '%s\n' "$name"
    done
}

# deepspeed_env: NAME=VALUE lines. The launchers stop at a line without "=", and mpirun takes the quotes that other
# characters need for a part of the value.
deepspeed_env() {
    local name names
    names=$(exported_names) || exit
    sort -u <<<"$names" | while read -r name; do
        [[ ${!name} =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] ||
            refuse "$name must consist of letters, digits and _@%+=:,./- to go through every launcher;" \
                'it has others. Change it, or unset it.'
        printf '%s=%s\n' "$name" "${!name}"
    done
}

# write FILE TEXT: whole or not at all.
write() {
    printf '%s\n' "$2" >"$1.new"
    mv "$1.new" "$1"
}

# take_key NAME: ssh refuses a key that others may read, and mounted secrets keep the mode they had outside.
take_key() {
    local from=${FLORA_SECRETS:-/run/secrets}/$1
    [[ -e $from ]] || refuse "sshd needs the key '$from' and there is none. Mount it; docker/README.md says how."
    [[ -r $from ]] || refuse "the key '$from' must be readable by uid $(id -u), and is not." \
        "Give the file to that uid, or build the image with --build-arg USER_ID of its owner."
    install -m 600 "$from" "$HOME/.ssh/$1"
    ssh-keygen -y -P '' -f "$HOME/.ssh/$1" >"$HOME/.ssh/$1.pub" ||
        refuse "the key '$from' must be a private ssh key without a passphrase; ssh-keygen's message is above."
}

sshd_config() {
    cat <<END
Port $PORT
HostKey $HOME/.ssh/host_key
AuthorizedKeysFile $HOME/.ssh/client_key.pub
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
DisableForwarding yes
UseDNS no
MaxStartups 100:30:200
ClientAliveInterval 5
ClientAliveCountMax 3
SetEnv $1
END
}

become_sshd() {
    install -d -m 700 "$HOME/.ssh"
    take_key client_key
    take_key host_key
    # All nodes have one host key, so that none has to be trusted at first sight.
    write "$HOME/.ssh/known_hosts" "* $(cut -d ' ' -f 1,2 "$HOME/.ssh/host_key.pub")"
    # For `ssh node2 COMMAND` and for mpirun, which do not read ~/.deepspeed_env.
    write "$HOME/.ssh/sshd_config" "$(sshd_config "$(paste -s -d ' ' "$HOME/.deepspeed_env")")"
    exec /usr/sbin/sshd -D -e -f "$HOME/.ssh/sshd_config"
}

(($#)) || refuse "it starts a command and was given none. Name one; 'sshd' makes a node of a cluster."
umask 077
lines=$(deepspeed_env)
write "$HOME/.deepspeed_env" "$lines"
umask 022
[[ $* != sshd ]] || become_sshd
exec "$@"
