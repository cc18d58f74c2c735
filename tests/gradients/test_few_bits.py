# SPDX-License-Identifier: Apache-2.0
"""Gradients kept and sent in few bits: every layout is the reference of as many ranks.

In float64 a number lies within rounding of a level's edge once in 1e13, so layouts differ by the
order of sums alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import flora_dist
from flora_dist import Flora
from flora_dist.gradients.request import SketchRequest
from tests.battery.oracle import distances
from tests.battery.test_layouts import EXACT
from tests.battery.wrapped import ALIGNED, LAYOUTS
from tests.conftest import pool_of
from tests.gradients import layouts
from tests.gradients.few_bits import reference_run
from tests.gradients.oracle import MANY, SketchedCase, Weights
from tests.gradients.small import Small, attached, inputs

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
    ("fsdp2 x3", case_of(2, None, 1, momentum="flora", state_bits=8)),
    ("columns x2", case_of(4, None, 1)),
    ("hsdp 2x2", case_of(4, 2, 2)),
    (ALIGNED, case_of(4, None, 1)),
]
FAULTS = [
    ("ddp x2", "rounding key", 1),
    ("ddp x2", "owner's sum", 1),
    ("ddp x2", "basis of its own", 1),
    ("plain", "scale", 1),
    ("plain", "packing order", 1),
    ("plain", "levels of sums", 2),
    ("plain", "micro-batches", 2),
]


@cache
def _expected(case: str, ranks: int) -> tuple[Weights, Weights]:
    cases = [*(c for _, c in RUNS), *(case_of(4, None, number) for number in (1, 2))]
    return reference_run({str(c): c for c in cases}[case], ranks)


@pytest.mark.parametrize(("layout", "case"), RUNS, ids=str)
def test_a_layout_is_the_reference_of_as_many_ranks(layout: str, case: SketchedCase) -> None:
    held = LAYOUTS[layout]
    everyone = pool_of(held.ranks)(layouts.run, layout, case)
    weights, norms = everyone[0]
    for theirs, their_norms in everyone[1:]:
        assert their_norms == norms
        assert all(torch.equal(value, weights[name]) for name, value in theirs.items())
    _, worst = distances(*_expected(str(case), held.shares or held.ranks), weights)
    assert worst < EXACT


@pytest.mark.parametrize(("layout", "fault", "micro_batches"), FAULTS)
def test_a_broken_mechanism_is_seen(layout: str, fault: str, micro_batches: int) -> None:
    ranks, _ = layouts.LAYOUTS[layout]
    case = case_of(4, None, micro_batches)
    weights, _ = pool_of(ranks)(layouts.run, layout, case, fault)[0]
    _, worst = distances(*_expected(str(case), ranks), weights)
    assert not worst < 1e6 * EXACT


def test_bytes_are_those_of_records() -> None:
    _, handle = attached(Small(), gradient_bits=4)
    rows = {row.name: row for row in handle.report().rows if row.is_sketched}
    # 24 rows of 20 columns: 3 blocks of 8 numbers, 4 bytes and 2 of the scale each
    assert rows["first.weight"].held_bytes == 24 * 3 * (4 + 2)
    assert rows["first.weight"].how == "compressed, 8 per block of 8 in 4 bits"
    for flow in handle.gradients.flows.values():
        row = rows[flow.part.name]
        handle.gradients.take(flow, torch.ones(row.shape))
        kept = flow.accumulator.sums_ENKR
        assert kept is not None
        assert kept.numel() * kept.itemsize == row.held_bytes


@pytest.mark.parametrize(("bits", "micro_batches"), [(1, 2), (2, 5)])
def test_rounding_that_costs_more_than_it_saves_is_warned_of(bits: int, micro_batches: int) -> None:
    model = Small()
    optimizer, _ = attached(model, gradient_bits=bits)
    for number in range(micro_batches):
        (model(inputs(number)) / micro_batches).backward()
    with pytest.warns(UserWarning, match=f"rounded to {bits} bits .* {micro_batches} times"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_bits": 3}, "gradient_bits must be one of 32, 16, 8, 4, 2, 1; got 3"),
        ({"gradient_bits": 4, "wire_bits": 8}, "wire_bits must not exceed gradient_bits"),
        ({"gradient_bits": 4, "wire_dtype": "bfloat16"}, "wire_bits=16 in other words"),
        ({"gradient_bits": 4, "gradient_rank": 9}, "rank=9, block=8, 4 bits"),
        ({"gradient_rank": 8}, "rank must be below block; got rank=8, block=8, 32 bits"),
        ({"level": "fused", "gradient_bits": 4}, '"fused" keeps its numbers in full'),
        ({"level": "sharded", "gradient_bits": 4}, '"sharded" keeps its numbers in full'),
        ({"settings": {"sketch": "gaussian"}, "gradient_bits": 4}, "need sketch='hadamard'"),
    ],
)
def test_what_cannot_be_kept_in_few_bits_is_refused(options: dict[str, Any], message: str) -> None:
    model = Small()
    with pytest.raises(ValueError, match=message):
        attached(model, **options)
    attached(model)  # nothing has changed


def test_without_words_all_numbers_of_a_block_are_kept_and_sent_in_4_bits() -> None:
    bare = SketchRequest(gradients="compressed")
    assert (bare.bits, bare.wire.bits) == (4, 4)
    model = Small()
    handle = flora_dist.attach(
        model, Flora(model.named_parameters(), block=8, rank=2), "compressed"
    )
    (row,) = [row for row in handle.report().rows if row.name == "first.weight"]
    assert row.how == "compressed, 8 per block of 8 in 4 bits"


@pytest.mark.parametrize(
    "said",
    [
        {"gradient_rank": 2},
        {"wire_dtype": "bfloat16"},
        {"wire_bits": 4},
        {"gradients": "fused"},
        {"gradients": "sharded"},
    ],
)
def test_whoever_says_more_has_numbers_in_full(said: dict[str, Any]) -> None:
    assert SketchRequest(**{"gradients": "compressed", **said}).bits == 32


def test_half_precision_has_two_names() -> None:
    half = SketchRequest(gradients="compressed", wire_dtype="bfloat16")
    assert SketchRequest(gradients="compressed", wire_bits=16).wire == half.wire


def test_blocks_that_tensor_parallelism_cuts_are_refused() -> None:
    with pytest.raises(Exception, match=r"must cut no block of gradients in few bits"):
        pool_of(2)(layouts.run, "tp x2", case_of(4, None, 1))
