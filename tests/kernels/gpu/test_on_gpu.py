# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on a GPU. No GPU has run these yet; ``launch/gpu.sh`` does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flora_dist import Flora
from flora_dist.kernels.gpu.choice import VARIABLE
from flora_dist.kernels.gpu.graph import record_graph
from tests.kernels.gpu import runs
from tests.kernels.gpu.bits import wrong_bits
from tests.kernels.gpu.cuda_bits import other_bits
from tests.kernels.gpu.cut_runs import wrong_cuts
from tests.kernels.gpu.drawn_runs import wrong_steps
from tests.kernels.gpu.record_runs import wrong_records
from tests.kernels.gpu.sketch_runs import wrong_sketches
from tests.kernels.paths import parted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")


@pytest.mark.parametrize("seed", range(12))
def test_random_runs_are_the_same_by_triton_and_by_torch(seed: int) -> None:
    assert not runs.difference(runs.small_case_of(seed))


def test_spans_and_column_shards_are_the_same_by_triton_and_by_torch() -> None:
    assert wrong_cuts(range(4)) == []


def test_bits_on_a_gpu_are_those_of_the_cpu() -> None:
    assert wrong_bits("cuda") == []
    assert other_bits("cuda") == []


def test_sketches_of_rows_in_bf16_have_the_precision_of_fp32() -> None:
    assert wrong_sketches("cuda") == []


def test_gradients_are_added_to_records_with_the_bits_of_torchs_operators() -> None:
    assert wrong_records("cuda", range(12)) == []


def test_steps_on_sketches_are_the_same_by_triton_and_by_torch() -> None:
    assert wrong_steps("cuda", range(8)) == []


def test_a_step_in_a_cuda_graph_equals_the_eager_one() -> None:
    assert not runs.by_graph(runs.GRAPHED, record_graph)


def test_a_step_waits_for_nothing_on_the_device() -> None:
    assert runs.synchronisations() == []


def test_the_optimizer_takes_the_kernels_and_its_report_says_so() -> None:
    weight = torch.nn.Parameter(torch.zeros(64, 64, device="cuda"))
    assert "kernels: triton 3." in Flora([("w", weight)]).report().summary()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_on_a_gpu_is_that_of_the_cpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(runs.FIXED, seed=1, dtype=dtype)
    monkeypatch.setattr(runs, "DEVICE", "cpu")
    start, expected = runs.run(case, runs.by_torch)
    monkeypatch.setattr(runs, "DEVICE", "cuda")
    found = {key: value.cpu() for key, value in runs.run(case, runs.by_kernels)[1].items()}
    assert not parted(case, start, expected, found)
