# SPDX-License-Identifier: Apache-2.0
"""Kernels as compiled for GPUs that are not here stay within limits. In a process of its own:
kernels are interpreted or compiled from their import on."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.harness.launched import ROOT


def test_kernels_for_three_gpus_spill_nothing_and_load_128_bits_at_once() -> None:
    # Beside the clone, so that what did not change is not compiled again.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(ROOT / ".cache" / "triton")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.gpu.lint", "--quick"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for capability in ("80", "90", "100"):
        for name in ("finish bf16 rule 1", "measure_rows bf16 4096"):
            assert f"{name:22} {capability:>3}" in done.stdout
