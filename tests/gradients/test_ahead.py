# SPDX-License-Identifier: Apache-2.0
"""Sketches that are sent during backward: every bit as in one message, whatever happens meanwhile.

Numbers in few bits are summed by their owner in the order of ranks, so that buckets change nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.bench.wire_counts import payloads
from tests.bench.wire_setups import Setup
from tests.conftest import pool_of
from tests.gradients import ahead, layouts
from tests.gradients.ahead import TINY, after_a_failure, in_another_order, misused
from tests.gradients.oracle import MANY, SketchedCase
from tests.gradients.small import Small, attached

ONE = 32.0
"""MiB: all of the battery's model in one message."""


@pytest.mark.parametrize(
    ("layout", "micro_batches"),
    [("ddp x2", 4), ("fsdp2 x3", 1), ("fsdp2 x3", 4), ("hsdp 2x2", 1), ("hsdp 2x2", 4)],
)
def test_buckets_change_no_bit_of_a_run(layout: str, micro_batches: int) -> None:
    case = SketchedCase(
        gradient_bits=4, wire_bits=2, micro_batches=micro_batches, samples=MANY, bucket_cap_mb=ONE
    )
    pool = pool_of(layouts.LAYOUTS[layout][0])
    whole, norms = pool(layouts.run, layout, case)[0]
    cut, norms_of_cut = pool(layouts.run, layout, replace(case, bucket_cap_mb=TINY))[0]
    assert norms == norms_of_cut
    for name, weight in whole.items():
        torch.testing.assert_close(cut[name], weight, rtol=0.0, atol=0.0)


@pytest.mark.ranks(3)
def test_three_ranks_whose_gradients_are_missing_send_nothing_else() -> None:
    assert pool_of(3)(ahead.without_a_gradient) == 3 * [(True, True)]


@pytest.mark.ranks(2)
def test_gradients_that_come_in_another_order_on_each_rank_are_sent_in_one() -> None:
    for is_same, is_ahead in pool_of(2)(in_another_order):
        assert is_same
        assert is_ahead


@pytest.mark.ranks(2)
def test_a_backward_that_fails_leaves_nothing_to_the_next_step() -> None:
    for found in pool_of(2)(after_a_failure):
        assert all(found.values()), found


@pytest.mark.ranks(2)
def test_a_rank_that_drops_alone_what_it_has_sent_is_told_of_to_the_others() -> None:
    nothing, message = pool_of(2)(ahead.on_one_rank_alone)
    assert nothing == ""
    assert "ranks [0] of the group have dropped theirs" in message


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("accumulating", "came after its own was sent. Put all micro-batches but the last in"),
        ("adding", "came after its own was sent"),
        ("zeroed in part", "can only be zeroed all together"),
        ("too early", "extra.weight' came after its own was sent"),
    ],
)
def test_gradients_cannot_change_once_they_are_sent(how: str, message: str) -> None:
    for found in pool_of(2)(misused, how):
        assert message in found


# Two layers of two matrices: 8 rows with a block of 16 numbers, 16 rows with one of 8; in 4 bits
# 10 and 6 bytes with the scale. A flag for the rank and one for each parameter come before the
# records for every rank; means go from each to both.
SETUP = Setup(
    layout="ddp",
    model=("stack", (("layers", 2), ("width", 16), ("inner", 8))),
    bits=4,
    micro_batches=2,
    block=16,
)
RECORDS = 8 * 10 + 16 * 6
"""Bytes of a layer."""


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("cap", "messages"),
    [
        (None, [2 * (1 + 4) + 2 * RECORDS, 2 * RECORDS]),
        (2 * RECORDS / 2**20, [2 * (1 + 4) + 2 * RECORDS, 2 * RECORDS]),
        (RECORDS / 2**20, 2 * [2 * (1 + 2) + RECORDS] + 2 * [RECORDS]),
    ],
)
def test_every_bucket_is_one_message_each_way(cap: float | None, messages: list[int]) -> None:
    everyone = pool_of(2)(payloads, replace(SETUP, bucket_cap_mb=cap))
    for sent in everyone:
        sketches = [p for p in sent if p.purpose == "sketches"]
        assert [p.elements for p in sketches] == messages
        assert {p.kind for p in sketches} == {"all_to_all"}


def test_one_process_sends_nothing_and_takes_the_same_words() -> None:
    model = Small()
    optimizer, handle = attached(model, gradient_bits=4, bucket_cap_mb=TINY)
    for _ in range(2):
        model(torch.ones(2, 20)).backward()
    assert not handle.gradients._is_under_way
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_cap_mb": 0}, "bucket_cap_mb must be a number of MiB above 0; got 0"),
        ({"bucket_cap_mb": True}, "got True"),
        ({"bucket_cap_mb": 1, "gradient_bits": 32}, "Leave it out, or pass wire_bits=4"),
        ({"bucket_cap_mb": 1, "level": "fused", "gradient_bits": 32}, "got gradients='fused'"),
    ],
)
def test_what_cannot_be_sent_ahead_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(Small(), **{"gradient_bits": 4, **options})
