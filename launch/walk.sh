#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Walks a newcomer's way from a fresh clone: the commands of README and docs/trainer.md as they are
# printed, each with its seconds. README's `pip install` lines go into an environment that has a torch
# already, and that torch must be the same files afterwards.
#
#     ./launch/walk.sh               # in a folder that is removed at the end
#     ./launch/walk.sh FOLDER        # stays; the same command goes on behind the last step that passed

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_common.sh
source launch/_common.sh

if (($#)); then
    mkdir -p "$1"
    work=$(cd "$1" && pwd)
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
readonly TIMES=$work/times
touch "$TIMES"

# As on a bare machine DeepSpeed's helper is compiled, and none that another environment uses is replaced.
export TORCH_EXTENSIONS_DIR=$work/torch_extensions

# As `source .venv/bin/activate` does; quickstart.sh makes it.
environment=$work/clone/.venv

# timed COMMAND: in the clone and the environment, unless it has passed before; its line goes to TIMES.
timed() {
    local command=$1 began=$SECONDS
    if grep -qF "  $command" "$TIMES"; then
        return
    fi
    say "$command"
    (
        cd "$work/clone"
        PATH=$environment/bin:$PATH bash -euo pipefail -c "$command"
    ) || refuse "'$command' failed after $((SECONDS - began)) s; its output is above."
    printf '%5d s  %s\n' $((SECONDS - began)) "$command" >>"$TIMES"
}

# printed FILE HEADING: the commands of the bash blocks below a heading, one a line.
printed() {
    awk -v heading="## $2" '
        /^## / { here = $0 == heading }
        here && /^```/ { inside = /^```bash/; next }
        here && inside { sub(/ +#.*/, ""); line = $0; sub(/\\$/, "", line); printf "%s%s", line, /\\$/ ? "" : "\n" }' "$1"
}

# walk FILE HEADING PROGRAM: those of these commands that start with the program's name, timed.
walk() {
    local command walked=0
    while IFS= read -r command <&3; do
        [[ $command == "$3 "* ]] || continue
        timed "$command"
        walked=1
    done 3< <(printed "$1" "$2")
    ((walked)) || refuse "'$1' must show a command of $3 below '$2', and shows none. Mend its block of bash."
}

# torch_of PYTHON: its version, and which file that is and since when.
torch_of() {
    "$1" -W 'ignore:Failed to initialize NumPy' -c 'import os, torch
found = os.stat(torch.__file__)
print(torch.__version__, found.st_ino, found.st_mtime_ns)'
}

# walk_into_existing: README's lines for an environment that has torch; it is to be kept as it is.
walk_into_existing() {
    local python=$work/existing/bin/python before=$work/torch_before after
    environment=$work/existing
    [[ -x $python ]] || "$BASE_PYTHON" -m venv "$work/existing"
    [[ -f $before ]] ||
        "$python" -m pip install --quiet --no-compile --disable-pip-version-check -c "$CONSTRAINTS" torch
    # A walk that goes on does not repeat what it has walked: what was there before it stays written.
    [[ -f $before ]] || torch_of "$python" >"$before"
    walk README.md Install pip
    timed 'cd / && flora-dist --version'
    after=$(torch_of "$python")
    [[ $(<"$before") == "$after" ]] ||
        refuse "pip must keep the torch that is there ('$(<"$before")'); afterwards it was '$after'."
    environment=$work/clone/.venv
}

[[ -d $work/clone ]] || git clone --quiet . "$work/clone"
walk_into_existing
timed './launch/quickstart.sh'
# A training that was ended half way would be refused: it overwrites no run.
grep -qF '  flora-dist train' "$TIMES" || rm -rf "$work/clone/runs/mine"
[[ -f $work/clone/mytext.txt ]] ||
    for line in {1..400}; do echo "Once upon a time, $line small models met."; done >"$work/clone/mytext.txt"
walk README.md 'Your own data in five minutes' flora-dist
timed 'python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained(\"mine-hf\")"'
walk docs/trainer.md Resume flora-dist
cat "$TIMES"
