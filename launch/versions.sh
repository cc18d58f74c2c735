#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the core of the tests on other versions of Python and torch, each in an environment of its own
# that is removed afterwards. Not part of check.sh: each pair downloads a torch.
#
#     ./launch/versions.sh                        # the oldest and the newest that are supported
#     ./launch/versions.sh python3.12:2.12.0      # pairs of an interpreter and a version of torch
#
# A pair whose interpreter is not installed, or whose torch cannot be, is said and counts as a failure.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_common.sh
source launch/_common.sh

readonly CORE=(tests/reference tests/sketch tests/optimizer tests/test_tiles.py tests/test_packaging.py)
pairs=("$@")
((${#pairs[@]})) || pairs=(python3.10:2.11.0 python3.13:2.14.1)

# try PYTHON TORCH FOLDER: installs and runs; the last line of pytest goes to FOLDER/result.
try() {
    local python=$1 torch=$2 folder=$3
    if ! command -v "$python" >/dev/null; then
        echo "not run: $python is not installed" >"$folder/result"
        return 1
    fi
    "$python" -m venv "$folder/venv"
    if ! "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "torch==$torch" numpy packaging pytest pytest-timeout psutil hatchling >"$folder/pip" 2>&1; then
        tail -n 3 "$folder/pip" >&2
        echo "not run: torch $torch cannot be installed for $python" >"$folder/result"
        return 1
    fi
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[train]'
    local code=0
    "$folder/venv/bin/python" -m pytest -q -m 'not slow and not cluster and not deepspeed and not gpu' \
        "${CORE[@]}" | tee "$folder/log" || code=$?
    tail -n 1 "$folder/log" >"$folder/result"
    return "$code"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
lines=()
for pair in "${pairs[@]}"; do
    [[ $pair == *:* ]] || refuse "a pair is PYTHON:TORCH, such as python3.10:2.11.0; it is '$pair'."
    folder=$work/${pair//[^A-Za-z0-9.]/-}
    mkdir "$folder"
    say "$pair"
    try "${pair%%:*}" "${pair#*:}" "$folder" || failed=1
    lines+=("$(printf '%-22s %s' "$pair" "$(<"$folder/result")")")
done
printf '%s\n' "${lines[@]}"
exit "$failed"
