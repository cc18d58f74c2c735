# SPDX-License-Identifier: Apache-2.0
"""Gradients kept and sent in few bits: every layout is the reference of as many ranks.

In float64 a number lies within rounding of a level's edge once in 1e13, so layouts differ by the
order of sums alone.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.battery.oracle import distances
from tests.battery.test_layouts import EXACT
from tests.conftest import pool_of
from tests.gradients import layouts
from tests.gradients.few_bits import reference_run
from tests.gradients.oracle import MANY, SketchedCase, Weights

BLEND = {"momentum": "blend"}


def case_of(kept: int | None, sent: int | None, micro_batches: int, **more: object) -> SketchedCase:
    return SketchedCase(
        settings={**BLEND, **more},
        gradient_bits=kept,
        wire_bits=sent,
        micro_batches=micro_batches,
        samples=MANY,
    )


RUNS = [
    ("plain", case_of(8, None, 3, state_bits=4)),
    ("ddp x2", case_of(4, 1, 2)),
    ("ddp x2", case_of(32, 4, 1)),
    ("fsdp2 x2", case_of(4, None, 2)),
    ("fsdp2 x3", case_of(2, None, 1, momentum="flora", state_bits=8)),
    ("columns x2", case_of(4, None, 1)),
]
FAULTS = [
    ("ddp x2", "rounding key", 1),
    ("ddp x2", "owner's sum", 1),
    ("ddp x2", "basis of its own", 1),
    ("plain", "scale", 1),
    ("plain", "levels of sums", 2),
    ("plain", "micro-batches", 2),
]


@cache
def _expected(case: str, ranks: int) -> tuple[Weights, Weights]:
    cases = [*(c for _, c in RUNS), *(case_of(4, None, number) for number in (1, 2))]
    return reference_run({str(c): c for c in cases}[case], ranks)


@pytest.mark.parametrize(("layout", "case"), RUNS, ids=str)
def test_a_layout_is_the_reference_of_as_many_ranks(layout: str, case: SketchedCase) -> None:
    ranks, _ = layouts.LAYOUTS[layout]
    everyone = pool_of(ranks)(layouts.run, layout, case)
    weights, norms = everyone[0]
    for theirs, their_norms in everyone[1:]:
        assert their_norms == norms
        assert all(torch.equal(value, weights[name]) for name, value in theirs.items())
    _, worst = distances(*_expected(str(case), ranks), weights)
    assert worst < EXACT


@pytest.mark.parametrize(("layout", "fault", "micro_batches"), FAULTS)
def test_a_broken_mechanism_is_seen(layout: str, fault: str, micro_batches: int) -> None:
    ranks, _ = layouts.LAYOUTS[layout]
    case = case_of(4, None, micro_batches)
    weights, _ = pool_of(ranks)(layouts.run, layout, case, fault)[0]
    _, worst = distances(*_expected(str(case), ranks), weights)
    assert not worst < 1e6 * EXACT
