# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# What quickstart.sh and check.sh share: look at the machine, make .venv, install once.
# Sourced with `set -euo pipefail`, from the root of the repository. Exit code 2: the machine lacks something.

readonly VENV=.venv
readonly VENV_PYTHON=$VENV/bin/python
readonly STAMP=$VENV/.flora_stamp
readonly CONSTRAINTS=launch/constraints.txt
readonly BASE_PYTHON=${PYTHON:-python3}

# We install without compiled modules, for each process to keep what it compiles: where that is forbidden, as in
# many containers, every process compiles torch anew, ten seconds each.
unset PYTHONDONTWRITEBYTECODE

say() {
    printf '%s: %s\n' "${0##*/}" "$*"
}

refuse() {
    say "$@" >&2
    exit 2
}

is_supported_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))'
}

# python_package PART: Debian calls the default interpreter's packages python3-PART and those of any other
# one pythonX.Y-PART.
python_package() {
    if [[ $BASE_PYTHON == python3 ]]; then
        echo "python3-$1"
    else
        "$BASE_PYTHON" -c 'import sys; print("python%d.%d-%s" % (*sys.version_info[:2], sys.argv[1]))' "$1"
    fi
}

# DeepSpeed compiles its helper for the CPU against torch's headers, which include Python.h.
has_python_headers() {
    "$1" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}

require_machine() {
    local missing=()
    if ! command -v "$BASE_PYTHON" >/dev/null; then
        missing+=(python3 python3-venv python3-dev)
    elif ! is_supported_python "$BASE_PYTHON"; then
        refuse "Python must be 3.10 or newer; '$BASE_PYTHON' is $("$BASE_PYTHON" -V 2>&1)." \
            "Use Debian 12, Ubuntu 22.04 or newer, or name another one: PYTHON=python3.12 $0"
    else
        # Debian and Ubuntu ship venv without ensurepip, so venv alone proves nothing.
        "$BASE_PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing+=("$(python_package venv)")
        has_python_headers "$BASE_PYTHON" || missing+=("$(python_package dev)")
    fi
    command -v g++ >/dev/null || missing+=(g++)
    if ((${#missing[@]})); then
        local as_root=''
        ((EUID == 0)) || as_root='sudo '
        refuse "this machine lacks ${missing[*]}. Install with:
    ${as_root}apt-get update && ${as_root}apt-get install -y ${missing[*]}"
    fi
}

ensure_venv() {
    if [[ ! -e $VENV ]]; then
        say "making $VENV with $("$BASE_PYTHON" -V 2>&1)"
        # A folder left half made would be taken for a good one by the next run.
        trap 'rm -rf "$VENV"; exit 130' INT TERM
        "$BASE_PYTHON" -m venv "$VENV" || {
            rm -rf "$VENV"
            refuse "'$BASE_PYTHON -m venv' failed; its message is above."
        }
        trap - INT TERM
    fi
    if ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 || ! is_supported_python "$VENV_PYTHON"; then
        refuse "'$VENV' must hold Python 3.10 or newer with pip, and does not. Remove it and run again: rm -rf $VENV"
    fi
}

# One line for everything that decides what an installation holds. The folder is part of it: an editable
# install names it, so a clone that was moved installs again.
fingerprint() {
    {
        pwd -P
        "$VENV_PYTHON" -VV
        cat pyproject.toml "$CONSTRAINTS" hatch_build.py flora_dist/kernels/compiler.py flora_dist/kernels/cpu/*
    } | sha256sum | cut -d ' ' -f 1
}

# install_extra EXTRA[,EXTRA]: pip only when something changed; `dev` contains `train` and `deepspeed`.
install_extra() {
    local extra=$1 now installed=''
    now=$(fingerprint)
    [[ ! -f $STAMP ]] || installed=$(<"$STAMP")
    if [[ $installed == "$extra $now" || $installed == "dev $now" ]]; then
        say "$VENV is up to date"
        return
    fi
    say "installing flora_dist[$extra] into $VENV; the first time this downloads torch"
    rm -f "$STAMP"
    # Of some 14,000 modules a run imports a fifth, and Python compiles those as it does: all of them take half a
    # minute of one core.
    local options=(--disable-pip-version-check --no-warn-script-location --no-compile -c "$CONSTRAINTS")
    # A person waits for gigabytes and wants the bar; a log wants what went wrong.
    [[ -t 1 ]] || options+=(--quiet)
    # torch first: our kernels are compiled against its headers, beside pip, which keeps one core busy at most.
    "$VENV_PYTHON" -m pip install "${options[@]}" torch
    local kernels=''
    if [[ ${FLORA_DIST_KERNELS:-} != torch ]]; then
        # torch misses numpy, which comes now, and would say so.
        "$VENV_PYTHON" -W 'ignore:Failed to initialize NumPy' -m flora_dist.kernels.build >/dev/null &
        kernels=$!
        # A compiler in the background hears no Ctrl-C.
        trap 'kill "$kernels" 2>/dev/null; exit 130' INT TERM
    fi
    if ! FLORA_DIST_KERNELS=torch "$VENV_PYTHON" -m pip install "${options[@]}" -e ".[$extra]"; then
        [[ -z $kernels ]] || kill "$kernels" 2>/dev/null || true
        wait
        exit 1
    fi
    if [[ -n $kernels ]] && ! wait "$kernels"; then
        say "the kernels were not compiled (why is said above): steps take torch's operators" >&2
    fi
    trap - INT TERM
    printf '%s %s\n' "$extra" "$now" >"$STAMP"
}

# install_torchtitan: it asks for older data sets than the trainer reads with, so pip would refuse both together.
# Its container of optimizers, which our tests build, reads no data.
install_torchtitan() {
    "$VENV_PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torchtitan"))' &&
        return
    say 'installing torchtitan without its dependencies'
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check -c "$CONSTRAINTS" --no-deps \
        torchtitan spmd-types tyro typeguard docstring-parser torchdata
}
