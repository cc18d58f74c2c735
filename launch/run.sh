#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The front door: starts the trainer or any script through deepspeed (pdsh, openmpi, no_ssh), torchrun,
# mpirun or Slurm, from the same arguments. `--help` lists them, `--dry-run` prints the exact commands:
#
#     ./launch/run.sh --launcher pdsh --hostfile launch/hostfile -m flora_dist.trainer --config configs/llama_900k.yaml
#     ./launch/run.sh --launcher torchrun --nodes node1:8,node2:8 train.py --my-argument
#
# The Python is that of .venv beside this folder, else PYTHON, else python3.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$here/.venv/bin/python
[[ -x $python ]] || python=${PYTHON:-python3}
exec "$python" -m flora_dist.cli launch "$@"
