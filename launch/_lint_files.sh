#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Part of check.sh: shell scripts, the Dockerfile, the compose file and the Kubernetes files against what their
# readers accept. The argument is the Python of an environment with the extra `dev`, which brings every tool:
#
#     launch/_lint_files.sh .venv/bin/python

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The tools that are no Python modules lie beside it.
python=${1:?'name the Python of an environment with the extra dev'}
tools=$(dirname "$python")

scripts=(.ci/run)
while IFS= read -r -d '' script; do
    scripts+=("$script")
done < <(find . \( -name '.?*' -o -name runs -o -name build -o -name dist \) -prune -o \
    \( -name '*.sh' -o -name '*.sbatch' \) -print0)

printf 'shellcheck: %d scripts\n' "${#scripts[@]}"
# -x: follow `source`, so that a part is seen with what it is given.
"$tools/shellcheck" -x "${scripts[@]}"

printf 'hadolint: docker/Dockerfile\n'
"$tools/hadolint" docker/Dockerfile

printf 'compose schema: docker/compose.yaml\n'
"$python" -m check_jsonschema --quiet --builtin-schema vendor.compose-spec docker/compose.yaml

printf 'Kubernetes schema: launch/k8s/job.yaml\n'
"$python" -m kubernetes_validate --quiet --no-warn --strict launch/k8s/job.yaml

printf 'Trainer models: launch/k8s/trainjob.yaml, deepspeed.yaml\n'
"$python" launch/k8s/_lint_trainjob.py launch/k8s/trainjob.yaml launch/k8s/deepspeed.yaml
