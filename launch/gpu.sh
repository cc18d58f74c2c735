#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything that needs a GPU, on one card, in at most nine minutes. A bare machine will do: Python with
# torch 2.11 or newer and Triton 3.6 or newer. Nothing is installed. A slice that has passed is not run
# again, so that the same command goes on after an interruption:
#
#     ./launch/gpu.sh
#     ./launch/gpu.sh --slice step         # one of them: bits runs records graph marked step sketch training
#     ./launch/gpu.sh --slice 60m          # losses: llama-60m, then 130m; not among the nine minutes
#     ./launch/gpu.sh --rehearse           # toy sizes on the CPU, kernels in Triton's interpreter
#     PYTHON=.venv/bin/python ./launch/gpu.sh --out results
#
# Each slice leaves NAME.json in the folder --out, by default runs/gpu with a name that follows from
# the sources; `python -m tests.bench.gpu_table FOLDER` prints them as tables. 60m and 130m train 16 and
# 12 times, on text made from the Python files of the machine: a run that has ended is kept, so that the
# same command after one that ran out of time does the rest. The exit code is 1 where a slice has found a
# fault or ran out of time, 2 where nothing can run.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PYTHON=${PYTHON:-python3}
# Seconds of each slice; those of the first line are less than nine minutes together.
declare -rA LIMITS=([bits]=40 [runs]=115 [records]=60 [graph]=40 [marked]=60 [step]=115 [sketch]=40 [training]=65
    [60m]=530 [130m]=530)
slices=(bits runs records graph marked step sketch training)
options=()
out=''

refuse() {
    printf 'gpu.sh: %s\n' "$*" >&2
    exit 2
}

while (($#)); do
    case $1 in
        --rehearse)
            options=(--rehearse)
            export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1
            ;;
        --slice | --out)
            (($# > 1)) || refuse "$1 needs a value. Give one."
            if [[ $1 == --out ]]; then
                out=$2
            else
                [[ -v LIMITS[$2] ]] || refuse "--slice must be one of ${slices[*]} 60m 130m; it is '$2'. Name one."
                slices=("$2")
            fi
            shift
            ;;
        *) refuse "'$1' is no option. Pass --rehearse, --slice NAME or --out FOLDER." ;;
    esac
    shift
done

export FLORA_DIST_GPU_KERNELS=triton

"$PYTHON" -c 'import torch, triton' ||
    refuse "'$PYTHON' must have torch and triton; the line above says what it lacks. Name another: PYTHON=... $0"

if [[ -z $out ]]; then
    digest=$(find flora_dist tests/gpu tests/kernels -name '*.py' -print0 | sort -z | xargs -0 cat |
        sha256sum | cut -c1-12)
    out=runs/gpu/${options[*]:+rehearsal-}$digest
fi
mkdir -p "$out"

faults=0
for slice in "${slices[@]}"; do
    result=$out/$slice.json
    if [[ -e $result ]]; then
        printf '%-9s has passed before: %s\n' "$slice" "$result"
        continue
    fi
    code=0
    timeout --kill-after=5 "${LIMITS[$slice]}" "$PYTHON" -W ignore -m tests.gpu.slices --slice "$slice" \
        --runs "$out/$slice.runs" "${options[@]}" >"$out/$slice.log" 2>"$out/$slice.err" || code=$?
    tail -n 1 "$out/$slice.log"
    if ((code == 0)); then
        # A file of this name says that the slice has passed, so it appears whole or not at all.
        tail -n 1 "$out/$slice.log" >"$result.part"
        mv "$result.part" "$result"
        continue
    fi
    faults=$((faults + 1))
    why="exit code $code"
    ((code != 124)) || why="out of time after ${LIMITS[$slice]} s"
    printf '%-9s FAILED, %s; its last words, all of them in %s:\n' "$slice" "$why" "$out/$slice.err"
    tail -n 5 "$out/$slice.err"
done
((faults == 0)) || exit 1
