#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# From a fresh clone to a trained model: make .venv, install, train llama-9m with Flora on 2 processes
# with FSDP2. Arguments go to the trainer:
#
#     ./launch/quickstart.sh
#     ./launch/quickstart.sh --set optimizer.rank=4

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_common.sh
source launch/_common.sh

require_machine
ensure_venv
install_extra train

# Two processes that each start a thread per core fight for the cores.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}

say "training llama-9m on 2 processes"
started=$(date +%s)
"$VENV_PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m flora_dist.trainer --config configs/llama_9m.yaml --set output.overwrite=true "$@" || {
    code=$?
    # torchrun prints a traceback of its own below the trainer's message.
    say "training ended with exit code $code; if a line above starts with 'error:', it says why" >&2
    exit "$code"
}

# Arguments may have named another run: the picture is the one that was not there before.
if [[ -d runs ]]; then
    find runs -name summary.png -newermt "@$started" | while read -r picture; do
        say "the picture is $picture"
    done
fi
