#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# A model that AdamW cannot fit into a limit of memory, trained by Flora in the same limit: the
# trainer runs twice under `ulimit -d`. Other arguments go to the trainer:
#
#     ./launch/memory_demo.sh
#     LIMIT_MIB=900 ./launch/memory_demo.sh --set train.steps=100

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_common.sh
source launch/_common.sh

# What a process may allocate, libraries' files not counted. Weights of 25.6 million parameters in
# float32 are 98 MiB, gradients as many, AdamW's two moments twice as many. Measured peaks of this
# number without a limit, with two threads: AdamW 1,018 MiB, Flora 847, with gradients as sketches
# 753. With one thread AdamW fits into 880.
readonly LIMIT_MIB=${LIMIT_MIB:-880}
[[ $LIMIT_MIB =~ ^[1-9][0-9]*$ ]] ||
    refuse "LIMIT_MIB must be a whole number of MiB; it is '$LIMIT_MIB'. Give one."

require_machine
ensure_venv
install_extra train

# Each thread takes memory for its stack, so that the limit holds for one number of them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

# limited NAME ARGUMENTS: the trainer within the limit; its exit code.
limited() {
    local name=$1
    shift
    say "training with $name in at most $LIMIT_MIB MiB"
    (
        ulimit -d $((LIMIT_MIB * 1024))
        "$VENV_PYTHON" -m flora_dist.trainer --config configs/memory_demo.yaml \
            --set output.overwrite=true --set output.name="memory_demo_$name" "$@"
    )
}

started=$SECONDS
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if limited adamw --set 'optimizer={name: adamw, lr: 5e-4}' "$@" >"$log" 2>&1; then
    say "AdamW fits into $LIMIT_MIB MiB here: lower LIMIT_MIB"
    exit 1
fi
if ! grep -i "can't allocate memory\|MemoryError\|bad_alloc" "$log"; then
    cat "$log" >&2
    refuse 'AdamW ended for another reason than memory; its output is above.'
fi
say "AdamW does not fit into $LIMIT_MIB MiB; the line above is torch's"
limited flora --set gradients.level=compressed --set gradients.rank=16 "$@"
say "Flora trained the same model in $LIMIT_MIB MiB; both tries took $((SECONDS - started)) s"
