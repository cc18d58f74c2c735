#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything that has to hold before a change is merged, cheapest first; stops at the first failure.
# Arguments go to pytest:
#
#     ./launch/check.sh
#     ./launch/check.sh -k philox -x
#     ./launch/check.sh -m slow

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_common.sh
source launch/_common.sh
# shellcheck source=launch/_hosts.sh
source launch/_hosts.sh

readonly STEPS=11
step=0
step_name='looking at the machine'
step_started=$SECONDS
durations=()
left_out=''

close_step() {
    ((step == 0)) || durations+=("$(printf '%5d s  %s' $((SECONDS - step_started)) "$step_name")")
}

# begin NAME: ends the step before, names the next one.
begin() {
    close_step
    step=$((step + 1))
    step_name=$1
    step_started=$SECONDS
    printf '\n==> [%d/%d] %s\n' "$step" "$STEPS" "$step_name"
}

finish() {
    local code=$?
    rm -rf "$elsewhere"
    if ((code == 0)); then
        close_step
        printf '\n'
        printf '%s\n' "${durations[@]}"
        say "all $STEPS steps passed in $SECONDS s$left_out"
    else
        printf '\n'
        say "FAILED with exit code $code in step $step/$STEPS, $step_name, after $((SECONDS - step_started)) s; the output above says why" >&2
    fi
}

require_machine
elsewhere=$(mktemp -d)
trap finish EXIT

begin 'environment: .venv with the dev extra'
ensure_venv
install_extra dev
install_torchtitan

begin 'lint: ruff check'
"$VENV_PYTHON" -m ruff check .

begin 'format: ruff format --check'
"$VENV_PYTHON" -m ruff format --check .

begin 'files: shell, Dockerfile, compose, Kubernetes'
launch/_lint_files.sh "$VENV_PYTHON"

begin 'types: mypy, strict'
"$VENV_PYTHON" -m mypy

begin 'layers: import-linter'
# Not the lint-imports script: pip writes the folder into its first line, which breaks in a clone that was moved.
"$VENV_PYTHON" -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

begin 'documentation: site with the API, links and anchors'
"$VENV_PYTHON" launch/_build_site.py "$elsewhere/site"

begin 'sdist: build, and the wheel from it'
"$VENV_PYTHON" -m build --no-isolation --outdir "$elsewhere/wheel" .

begin 'wheel: install in another environment, use without extras'
# The other environment sees torch and what torch needs through links, so nothing is downloaded again;
# it does not see .venv itself, whose extras would hide an import that the bare package cannot do.
# --no-index makes pip fail if the wheel asks for anything but torch.
"$VENV_PYTHON" -m venv --without-pip "$elsewhere/venv"
"$VENV_PYTHON" launch/_link_packages.py "$elsewhere/venv" torch pip
"$elsewhere/venv/bin/python" -m pip install --quiet --no-index --disable-pip-version-check "$elsewhere"/wheel/*.whl
(
    smoke=$PWD/launch/_use_wheel.py
    mkdir "$elsewhere/unrelated"
    cd "$elsewhere/unrelated"
    "$elsewhere/venv/bin/python" -I "$smoke"
    "$elsewhere/venv/bin/flora-dist" --help
)

begin 'machine: ssh, pdsh, Open MPI and Slurm for the tests on several hosts'
selected='not slow'
prepare_hosts || {
    [[ ${CI-} != true ]] || refuse 'with CI=true nothing may be left out.'
    selected='not slow and not cluster'
    left_out='; tests on several hosts were LEFT OUT, a line above says how to run them'
}

begin 'tests and doctests: pytest'
# Two workers: tests wait for one another's ranks, launchers and imports more than they compute.
"$VENV_PYTHON" -m pytest -m "$selected" -n 2 --no-loadscope-reorder "$@"
