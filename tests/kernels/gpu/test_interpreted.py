# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels step as torch's operators do, in Triton's interpreter on the CPU.

In a process of their own: kernels are interpreted or compiled from their import on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.harness.launched import ROOT

CASES = 8


@pytest.fixture(scope="module")
def verdict() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.kernels.gpu.verdict", "--cases", str(CASES)]
    # Interpreted products are small: threads only get in each other's way.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_random_runs_are_the_same_by_triton_and_by_torch(verdict: dict[str, Any]) -> None:
    assert len(verdict["cases"]) == CASES
    assert {seed: what for seed, what in verdict["cases"].items() if what} == {}
    assert not verdict["fixed"]


def test_spans_and_column_shards_are_stepped_the_same_by_triton_and_by_torch(
    verdict: dict[str, Any],
) -> None:
    assert verdict["wrong cuts"] == []


def test_rules_with_two_moments_are_the_same_by_triton_and_by_torch(
    verdict: dict[str, Any],
) -> None:
    assert verdict["two moments"] == {"subspace_adam": "", "apollo": ""}


def test_a_wrong_scalar_given_to_the_triton_kernels_is_noticed(verdict: dict[str, Any]) -> None:
    assert verdict["unnoticed"] == []


def test_triton_draws_and_rounds_with_the_same_bits_as_the_cpu(verdict: dict[str, Any]) -> None:
    assert verdict["wrong bits"] == []


def test_a_replayed_step_takes_nothing_from_the_step_that_was_recorded(
    verdict: dict[str, Any],
) -> None:
    assert not verdict["by graph"]


def test_sketches_of_rows_in_bf16_have_the_precision_of_fp32(verdict: dict[str, Any]) -> None:
    assert verdict["wrong sketches"] == []


def test_gradients_are_added_to_records_with_the_bits_of_torchs_operators(
    verdict: dict[str, Any],
) -> None:
    assert verdict["wrong records"] == []


def test_steps_on_sketches_are_the_same_by_triton_and_by_torch(verdict: dict[str, Any]) -> None:
    assert verdict["wrong steps on sketches"] == []


def test_kernels_that_pass_their_self_check_are_taken(verdict: dict[str, Any]) -> None:
    assert verdict["self-check"]["right"] == [*["GpuPhases"] * 3, "GpuVectorPhases"]


def test_wrong_kernels_are_left_to_torch_with_a_warning_that_names_them(
    verdict: dict[str, Any],
) -> None:
    for kernel, said in verdict["self-check"]["wrong"].items():
        assert said.startswith("NoneType: the Triton kernels must step as torch's operators do"), (
            said
        )
        assert f"they part in {kernel} by" in said


def test_kernels_that_do_not_run_are_left_to_torch_with_a_warning(
    verdict: dict[str, Any],
) -> None:
    said = verdict["self-check"]["failing"]
    assert said.startswith("NoneType: ")
    assert "they do not run: OSError: no C compiler" in said


def test_a_kernel_that_sketches_wrongly_is_left_to_torch_with_a_warning(
    verdict: dict[str, Any],
) -> None:
    assert verdict["self-check"]["sketched"] == ""
    said = verdict["self-check"]["sketched wrongly"]
    assert said.startswith("the Triton kernel accumulate must sketch as torch's operators do")
    assert "it parts by " in said
