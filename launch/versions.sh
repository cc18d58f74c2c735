#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the core of the tests on other versions of Python and torch, each in an environment of its own
# and on a copy of the files that git knows. Not part of check.sh: each pair downloads a torch.
#
#     ./launch/versions.sh                        # the oldest and the newest that are supported
#     ./launch/versions.sh python3.12:2.12.0      # pairs of an interpreter and a version of torch
#     CORE='tests/sketch' ./launch/versions.sh    # some of the tests
#
# The environments stay in .cache/versions for the next time; remove them to start afresh.
# A pair whose interpreter does not run, or whose torch cannot be installed, counts as a failure.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_common.sh
source launch/_common.sh

readonly KEPT=.cache/versions
read -ra core <<<"${CORE:-tests/reference tests/sketch tests/optimizer tests/test_tiles.py tests/test_packaging.py}"
pairs=("$@")
((${#pairs[@]})) || pairs=(python3.10:2.11.0 python3.13:2.14.1)

# prepare PYTHON TORCH FOLDER: the environment and the files; what went wrong goes to FOLDER/result.
prepare() {
    local python=$1 torch=$2 folder=$3
    # Not command -v: a version manager's stand-in is there and does not run.
    if ! "$python" -c '' 2>/dev/null; then
        echo "not run: $python is not installed" >"$folder/result"
        return 1
    fi
    [[ -x $folder/venv/bin/python ]] || "$python" -m venv "$folder/venv" || return 1
    rm -rf "$folder/tree"
    mkdir "$folder/tree"
    # A copy: our kernels are compiled against that torch, and lie among the files.
    git ls-files -z | xargs -0 cp --parents -t "$folder/tree" || return 1
    local pip=("$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    if ! "${pip[@]}" "torch==$torch" numpy packaging pytest pytest-timeout psutil hatchling \
        >"$folder/pip" 2>&1 || ! "${pip[@]}" -e "$folder/tree[train]" >>"$folder/pip" 2>&1; then
        tail -n 3 "$folder/pip" >&2
        echo "not run: torch $torch or flora_dist cannot be installed for $python" >"$folder/result"
        return 1
    fi
}

# try FOLDER: one pytest for each part of the core; their last lines go to FOLDER/result.
try() {
    local folder=$1 part code=0
    : >"$folder/result"
    for part in "${core[@]}"; do
        (cd "$folder/tree" && ../venv/bin/python -m pytest -q \
            -m 'not slow and not cluster and not deepspeed and not gpu' "$part") \
            | tee "$folder/log" || code=1
        printf '%s: %s\n' "$part" "$(tail -n 1 "$folder/log")" >>"$folder/result"
    done
    return "$code"
}

failed=0
lines=()
for pair in "${pairs[@]}"; do
    [[ $pair == *:* ]] || refuse "a pair is PYTHON:TORCH, such as python3.10:2.11.0; it is '$pair'."
    folder=$KEPT/${pair//[^A-Za-z0-9.]/-}
    mkdir -p "$folder"
    say "$pair"
    { prepare "${pair%%:*}" "${pair#*:}" "$folder" && try "$folder"; } || failed=1
    lines+=("$pair" "$(<"$folder/result")")
done
printf '%s\n' "${lines[@]}"
exit "$failed"
