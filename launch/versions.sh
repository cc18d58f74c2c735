#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the core of the tests on other versions of Python and torch, each in an environment of its own
# and on a copy of the files that git knows. Not part of check.sh: each pair downloads a torch.
#
#     ./launch/versions.sh                        # the oldest and the newest that are supported
#     ./launch/versions.sh python3.12:2.12.0      # pairs of an interpreter and a version of torch
#     CORE='tests/sketch' ./launch/versions.sh    # some of the tests, by folder or file
#     LIMIT=7200 ./launch/versions.sh             # seconds for each part of the core, 3600 otherwise
#     PYTEST_TIMEOUT=1500 ./launch/versions.sh    # seconds for each test, on a busy machine
#
# It runs to its end whatever fails, and prints a table of Markdown: each file of tests, and how many
# passed, were skipped and failed. Exit code 1 if any failed or a pair could not be run.
# The environments stay in .cache/versions for the next time, with each part's log and JUnit report;
# remove them to start afresh. A pair whose interpreter does not run, or whose torch cannot be
# installed, counts as a failure, and so does a part that outlasts its limit.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_common.sh
source launch/_common.sh

readonly KEPT=.cache/versions
readonly LIMIT=${LIMIT:-3600}
readonly MARKERS='not slow and not cluster and not deepspeed and not gpu'
# Of the trainer and of the launchers, what runs in one process and knows torch or Python well.
core=(
    tests/reference tests/sketch tests/test_tiles.py tests/test_packaging.py
    tests/planner tests/launch/test_asking.py tests/launch/test_front_door.py
    tests/trainer/test_trainer_{arrange,cache,chunked_loss,config,data,documents,export,fallback}.py
    tests/trainer/test_trainer_{finite,folders,in_backward,metrics}.py
    tests/kernels tests/optimizer # the longest last
)
[[ -z ${CORE:-} ]] || read -ra core <<<"$CORE"
pairs=("$@")
((${#pairs[@]})) || pairs=(python3.10:2.11.0 python3.13:2.14.1)

# prepare PYTHON TORCH FOLDER: the environment and the files; what went wrong goes to FOLDER/rows.
prepare() {
    local python=$1 torch=$2 folder=$3
    # Not command -v: a version manager's stand-in is there and does not run.
    if ! "$python" -c '' 2>/dev/null; then
        echo "| not run | **$python is not installed** |" >"$folder/rows"
        return 1
    fi
    [[ -x $folder/venv/bin/python ]] || "$python" -m venv "$folder/venv" || return 1
    rm -rf "$folder/tree" "$folder/reports"
    mkdir "$folder/tree" "$folder/reports"
    # A copy: our kernels are compiled against that torch, and lie among the files.
    git ls-files -z | xargs -0 cp --parents -t "$folder/tree" || return 1
    local pip=("$folder/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check)
    if ! "${pip[@]}" "torch==$torch" numpy packaging pytest pytest-timeout psutil hatchling \
        >"$folder/pip" 2>&1 || ! "${pip[@]}" -e "$folder/tree[train,lora]" >>"$folder/pip" 2>&1 ||
        # The wheel goes on without its kernels where they do not compile; here that is a failure.
        ! compgen -G "$folder/tree/flora_dist/kernels/kernels-*.so" >/dev/null; then
        tail -n 3 "$folder/pip" >&2
        echo "| not run | **torch $torch, flora_dist or its kernels cannot be installed for $python** |" \
            >"$folder/rows"
        return 1
    fi
}

# try FOLDER: one pytest for each part of the core; a row for each file goes to FOLDER/rows.
try() {
    local folder=$1 part name code failed=0
    : >"$folder/rows"
    for part in "${core[@]}"; do
        name=${part//[^A-Za-z0-9_.]/-}
        say "$part"
        code=0
        (cd "$folder/tree" && timeout "$LIMIT" ../venv/bin/python -m pytest -q -p no:cacheprovider \
            -m "$MARKERS" -o junit_family=xunit1 --junitxml="../reports/$name.xml" "$part" \
            >"../reports/$name.log" 2>&1) || code=$?
        tail -n 1 "$folder/reports/$name.log"
        ((code == 0)) || failed=1
        if [[ -f $folder/reports/$name.xml ]]; then
            "$folder/venv/bin/python" launch/_by_file.py "$folder/reports/$name.xml" >>"$folder/rows"
        else # it was killed or has crashed: pytest writes its report last
            echo "| \`$part\` | **ended with code $code and no report (124: after $LIMIT s)** |" >>"$folder/rows"
        fi
    done
    return "$failed"
}

failed=0
lines=()
for pair in "${pairs[@]}"; do
    [[ $pair == *:* ]] || refuse "a pair is PYTHON:TORCH, such as python3.10:2.11.0; it is '$pair'."
    folder=$KEPT/${pair//[^A-Za-z0-9.]/-}
    mkdir -p "$folder"
    say "$pair"
    echo '| not run | **the environment could not be made** |' >"$folder/rows"
    { prepare "${pair%%:*}" "${pair#*:}" "$folder" && try "$folder"; } || failed=1
    lines+=("| $pair | |" '|---|---|' "$(<"$folder/rows")" '')
done
printf '%s\n' '' "${lines[@]}"
exit "$failed"
