#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# From a fresh clone to a trained model: make .venv, install, train a small llama with Flora on 2 processes
# with DeepSpeed ZeRO-2, or with FSDP2. Other arguments go to the trainer:
#
#     ./launch/quickstart.sh
#     ./launch/quickstart.sh --backend fsdp2
#     ./launch/quickstart.sh --set optimizer.rank=4

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_common.sh
source launch/_common.sh

# configs/llama_900k.yaml says the optimizer, the batches, the precision and that nothing is clipped; what the
# JSON has of these is for those who use it by itself.
readonly ZERO='{name: deepspeed, config: configs/deepspeed/zero2.json, changes: {optimizer: null,
    train_micro_batch_size_per_gpu: null, bf16: null, gradient_clipping: null}}'

backend=deepspeed
if [[ ${1-} == --backend ]]; then
    backend=${2-}
    shift "$(($# > 1 ? 2 : 1))"
fi
[[ $backend == deepspeed || $backend == fsdp2 ]] ||
    refuse "--backend must be deepspeed or fsdp2; it is '$backend'. Name one of them."

sees_gpu() {
    "$VENV_PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
}

# Unlike torchrun, the deepspeed launcher takes a fixed port if it is given none.
free_port() {
    "$VENV_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

prepare_deepspeed() {
    # Its compiler calls ninja by name.
    export PATH="$PWD/$VENV/bin:$PATH"
    sees_gpu || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    [[ ${DS_ACCELERATOR-} == cpu ]] || return 0
    local kept=${TORCH_EXTENSIONS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/torch_extensions}
    if [[ -z $(find "$kept" -name deepspeed_shm_comm.so -print -quit 2>/dev/null) ]]; then
        say "DeepSpeed compiles its helper for the CPU first, about a minute; it is kept in $kept"
    fi
    [[ -d $kept ]] || return 0
    # torch waits for ever for a lock whose owner was killed.
    find "$kept" -path '*/deepspeed_shm_comm/lock' 2>/dev/null | while read -r lock; do
        say "another program loads DeepSpeed's helper; if none does, it was killed meanwhile: rm $lock"
    done
}

require_machine
ensure_venv
install_extra train,deepspeed

# Two processes that each start a thread per core fight for the cores.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}

case $backend in
deepspeed)
    prepare_deepspeed
    # Not the script itself: pip writes the folder into its first line, which breaks in a clone that was moved.
    launcher=("$VENV_PYTHON" "$VENV/bin/deepspeed" --quiet --no_local_rank --num_accelerators 2
        --master_port "$(free_port)" --module)
    spread=(--set "backend=$ZERO")
    ;;
fsdp2)
    # torchrun by itself would listen to the whole network.
    launcher=("$VENV_PYTHON" -m flora_dist.cli launch --launcher torchrun --slots 2 -m)
    spread=(--set 'backend={name: fsdp2}')
    ;;
esac

say "training a llama of 0.9 million parameters on 2 processes with $backend"
started=$(date +%s)
"${launcher[@]}" flora_dist.trainer --config configs/llama_900k.yaml --set output.overwrite=true \
    "${spread[@]}" "$@" || {
    code=$?
    # The launchers print lines of their own below the trainer's message.
    say "training ended with exit code $code; if a line above starts with 'error:', it says why" >&2
    exit "$code"
}

# Arguments may have named another run: the picture is the one that was not there before.
if [[ -d runs ]]; then
    find runs -name summary.png -newermt "@$started" | while read -r picture; do
        say "the picture is $picture"
    done
fi
say "flora-dist is in this folder's environment: source $VENV/bin/activate"
say "then, to see what it writes: flora-dist generate runs/llama_900k --prompt 'def '"
