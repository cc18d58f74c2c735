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
    ("plain", case_of(4, None, 3)),
    ("plain", case_of(1, None, 1)),
    ("plain", case_of(8, None, 3, state_bits=4)),
    ("ddp x2", case_of(4, None, 3)),
    ("ddp x2", case_of(4, 1, 1)),
    ("ddp x2", case_of(32, 4, 3)),
    ("fsdp2 x2", case_of(4, None, 3)),
    ("fsdp2 x3", case_of(2, None, 3)),
    ("fsdp2 x3", case_of(8, 2, 1, momentum="flora", state_bits=8)),
    ("columns x2", case_of(4, None, 3)),
]


@cache
def _expected(case: str, ranks: int) -> tuple[Weights, Weights]:
    return reference_run({str(c): c for _, c in RUNS}[case], ranks)


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
