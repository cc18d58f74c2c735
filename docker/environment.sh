#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes the image's Python environment, /opt/flora: everything pyproject.toml asks for but the package itself.
# Run by the Dockerfile in a folder with pyproject.toml and constraints.txt.

set -euo pipefail

readonly VENV=/opt/flora
readonly PYTHON=$VENV/bin/python
readonly EXTRAS=train,deepspeed,mpi
readonly SECRETS=/run/secrets

refuse() {
    printf 'environment.sh: %s\n' "$*" >&2
    exit 2
}

# read_secrets: both are optional; where the network is open pip needs neither.
read_secrets() {
    [[ ! -s $SECRETS/pip_conf ]] || export PIP_CONFIG_FILE=$SECRETS/pip_conf
    [[ ! -s $SECRETS/ca_bundle ]] || export PIP_CERT=$SECRETS/ca_bundle
}

torch_of() {
    "$1" -c 'import importlib.metadata as m; d = m.distribution("torch"); print(d.version, d.locate_file("torch"))' 2>/dev/null
}

install() {
    "$PYTHON" -m pip install --quiet --no-cache-dir --disable-pip-version-check -c constraints.txt "$@"
}

# build_helper: on a CPU DeepSpeed compiles its shared-memory helper when training starts, for a minute, under a
# lock that outlives a killed process and then blocks every later run. Built here it is imported, and neither a
# compiler nor ninja is needed when training. Its vector code is chosen when it runs, so any CPU can run it.
wants_helper() {
    "$PYTHON" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'
}

has_helper() {
    "$PYTHON" -c 'import torch, deepspeed.ops.comm.deepspeed_shm_comm_op' 2>/dev/null
}

read_secrets
# NVIDIA's images pin hundreds of packages by it, some below what we need; /opt/flora comes first on the path.
unset PIP_CONSTRAINT
base_torch=$(torch_of python3) || base_torch=''
python3 -m venv --system-site-packages "$VENV"
if [[ -n $base_torch ]]; then
    sed -i '/^torch==/d' constraints.txt
    printf 'torch==%s\n' "${base_torch%% *}" >>constraints.txt
fi

# hatchling wants every file that pyproject.toml names.
mkdir -p flora_dist
touch README.md LICENSE flora_dist/__init__.py
# DeepSpeed's setup.py imports torch, which pip's isolated builds do not see.
install torch setuptools wheel hatchling ninja packaging psutil py-cpuinfo
if wants_helper; then
    export DS_ACCELERATOR=cpu DS_BUILD_SHM_COMM=1
fi
install --no-build-isolation --use-pep517 --no-binary deepspeed ".[$EXTRAS]"

if [[ -n $base_torch && $(torch_of "$PYTHON") != "$base_torch" ]]; then
    refuse "the base image's torch must stay; it was '$base_torch' and is '$(torch_of "$PYTHON")'." \
        "Take a base image whose torch satisfies pyproject.toml."
fi
if wants_helper && ! has_helper; then
    refuse "DeepSpeed's helper for the CPU must have been built with it and was not; pip's output above says why."
fi
rm -rf flora_dist README.md LICENSE
# 84 MB of test programs that torch's wheel brings.
rm -rf "$VENV"/lib/python3*/site-packages/torch/test
