#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Walks a newcomer's way from a fresh clone: the commands of README and docs/trainer.md as they are
# printed, each with its seconds.
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

# timed COMMAND: in the clone and its environment, unless it has passed before; its line goes to TIMES.
timed() {
    local command=$1 began=$SECONDS
    if grep -qF "  $command" "$TIMES"; then
        return
    fi
    say "$command"
    (
        cd "$work/clone"
        # As `source .venv/bin/activate` does; quickstart.sh makes it.
        PATH=$PWD/.venv/bin:$PATH bash -euo pipefail -c "$command"
    ) || refuse "'$command' failed after $((SECONDS - began)) s; its output is above."
    printf '%5d s  %s\n' $((SECONDS - began)) "$command" >>"$TIMES"
}

# printed FILE HEADING: the commands of the last bash block below a heading, one a line.
printed() {
    awk -v heading="## $2" '
        /^## / { here = $0 == heading }
        here && /^```/ { inside = /^```bash/; if (inside) text = ""; next }
        here && inside { sub(/ +#.*/, ""); line = $0; sub(/\\$/, "", line); text = text line (/\\$/ ? "" : "\n") }
        END { printf "%s", text }' "$1"
}

# walk FILE HEADING: these commands, timed.
walk() {
    local command
    while IFS= read -r command <&3; do
        [[ -z $command ]] || timed "$command"
    done 3< <(printed "$1" "$2")
}

[[ -d $work/clone ]] || git clone --quiet . "$work/clone"
timed './launch/quickstart.sh'
# A training that was ended half way would be refused: it overwrites no run.
grep -qF '  flora-dist train' "$TIMES" || rm -rf "$work/clone/runs/mine"
[[ -f $work/clone/mytext.txt ]] ||
    for line in {1..400}; do echo "Once upon a time, $line small models met."; done >"$work/clone/mytext.txt"
walk README.md 'Your own data in five minutes'
timed 'python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained(\"mine-hf\")"'
walk docs/trainer.md 'Resume'
cat "$TIMES"
