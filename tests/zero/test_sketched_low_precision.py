# SPDX-License-Identifier: Apache-2.0
"""Sketched gradients of bf16 and fp16 engines: summed in fp32; what is not finite is no step."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.battery.oracle import STEPS
from tests.battery.test_layouts import FLOAT_MODEL, FLOAT_PARAMETER
from tests.conftest import launched_pool_of
from tests.zero import low_precision, sketched, sketched_faults
from tests.zero.engines import Run
from tests.zero.low_precision import POISONED
from tests.zero.sketched import COMPRESSED

pytestmark = pytest.mark.deepspeed

FLORA = {"momentum": "flora"}
BF16 = [Run(stage=s, dtype="bf16", settings=FLORA, config=COMPRESSED) for s in (0, 2, 3)]
# At stage 0 it is refused.
FP16 = [Run(stage=s, dtype="fp16", settings=FLORA, config=COMPRESSED) for s in (1, 2, 3)]
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOADED = Run(stage=2, dtype="fp16", settings=FLORA, config=COMPRESSED, zero=OFFLOAD)


@cache
def _overflow(name: str) -> list[dict[str, Any]]:
    """What an inf left on each rank; two tests look at it."""
    run = {str(each): each for each in (*BF16, *FP16, OFFLOADED)}[name]
    return launched_pool_of(2)(low_precision.overflow, run)


@pytest.mark.parametrize("run", [*BF16, *FP16], ids=str)
def test_given_the_same_gradients_low_precision_is_the_reference_in_fp32(run: Run) -> None:
    # From a micro-batch's gradient on nothing is rounded to less than fp32: sums of sketches, norm,
    # clipping, and the loss scale, which is a power of two.
    (whole, worst), norm = launched_pool_of(2)(sketched.follow_own_gradients, run)[0]
    assert whole < FLOAT_MODEL
    assert worst < FLOAT_PARAMETER
    assert norm < 1e-6


@pytest.mark.parametrize("run", [*BF16, *FP16, OFFLOADED], ids=str)
def test_an_inf_on_one_rank_is_no_step_on_every_rank(run: Run) -> None:
    for result in _overflow(str(run)):
        assert result["changed"] == []
        assert result["compared"] > 100  # weights, partitions, states and counters
        assert result["skipped"] == 1
        # No loss uses one of the matrices, which is never stepped.
        assert result["counts"] == [{(POISONED, 1), (0, 0)}, {(STEPS - 1, 3), (0, 0)}]
        factor = 0.5 if run.dtype == "fp16" else 1.0
        assert result["scales"][1] == factor * result["scales"][0]
        assert all(bool(weight.isfinite().all()) for weight in result["masters"].values())


def test_skip_nonfinite_stands_in_for_a_check_that_is_switched_off() -> None:
    unchecked = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    settings = {**FLORA, "skip_nonfinite": True}
    run = Run(stage=2, dtype="bf16", settings=settings, config={**COMPRESSED, **unchecked})
    for result in launched_pool_of(2)(low_precision.overflow, run):
        assert result["changed"] == []
        assert result["skipped"] == 0  # DeepSpeed did not notice
        assert all(bool(weight.isfinite().all()) for weight in result["masters"].values())


@pytest.mark.parametrize("run", [BF16[0], BF16[2]], ids=str)
def test_after_an_inf_the_run_is_that_without_its_step(run: Run) -> None:
    # bf16 has no loss scale: every bit.
    skipped = _overflow(str(run))[0]["masters"]
    expected = launched_pool_of(2)(low_precision.leave_out, run)[0]
    assert [name for name, weight in expected.items() if not weight.equal(skipped[name])] == []


def test_sketches_of_a_skipped_step_that_stay_are_noticed() -> None:
    for message in launched_pool_of(2)(sketched_faults.overflow, FP16[1], "forgotten"):
        assert "averaged over the ranks once per step" in message
