# SPDX-License-Identifier: Apache-2.0
"""Breaks each phase of the Triton kernels in turn, in a copy, and looks whether a check notices.

    python -m tests.kernels.gpu.mutations
    python -m tests.kernels.gpu.mutations --only records

In Triton's interpreter, some 10 s of CPU for each. The exit code is 1 where a check passes on
broken kernels.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kernels.gpu.faults import CHECKS, MUTATIONS, Mutation

ROOT = Path(__file__).parents[3]
SOURCES = Path("flora_dist/kernels/gpu")


def is_noticed(mutation: Mutation) -> bool:
    """Whether the check finds something."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        hidden = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "flora_dist", copy / "flora_dist", ignore=hidden)
        shutil.copytree(ROOT / "tests" / "kernels", copy / "tests" / "kernels", ignore=hidden)
        (copy / "tests" / "__init__.py").touch()
        path = copy / SOURCES / mutation.file
        text = path.read_text()
        assert text.count(mutation.old) == 1, (mutation.file, mutation.old)
        path.write_text(text.replace(mutation.old, mutation.new))
        environment = {**os.environ, "PYTHONPATH": str(copy), "TRITON_INTERPRET": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        found = _ask(mutation.check, copy, environment)
        return bool(found)


def _ask(check: str, folder: Path, environment: dict[str, str]) -> str:
    """What a check has found, in the copy."""
    modules = "bits, cut_runs, drawn_runs, record_runs, runs, sketch_runs"
    code = f"from tests.kernels.gpu import {modules}\nprint({CHECKS[check]} or '')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=1800,
    )
    return done.stdout.splitlines()[-1]


def main() -> int:
    """Print each mutation; the exit code is 1 if one goes unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutations whose name holds this")
    parsed = parser.parse_args()
    missed = 0
    for name, mutation in MUTATIONS.items():
        if parsed.only not in name:
            continue
        noticed = is_noticed(mutation)
        missed += not noticed
        print(f"{name}: {'noticed' if noticed else 'NOT NOTICED'}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
