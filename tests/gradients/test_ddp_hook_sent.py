# SPDX-License-Identifier: Apache-2.0
"""What ``flora_hook`` sends, and what its report says of it."""

from __future__ import annotations

import pytest

from flora_dist.ddp import FloraState
from flora_dist.trainer.traffic import Traffic
from tests.conftest import pool_of
from tests.gradients.small import Small, my_inputs
from tests.gradients.test_ddp_hook import RANK, hooked

pytestmark = pytest.mark.ranks(2)


def sent(wire_dtype: str) -> tuple[list[int], int, int]:
    """Bytes this rank sends in each iteration, those reported, and elements of the model."""
    model = Small()
    wrapped, state = hooked(model, {"wire_dtype": wire_dtype})
    counted = []
    for _ in range(3):
        with Traffic() as traffic:
            wrapped(my_inputs(0)).backward()
        counted.append(traffic.bytes_sent)
    return counted, state.report().sent_bytes, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("wire_dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_what_is_sent_is_what_the_report_says(wire_dtype: str, width: int) -> None:
    for counted, reported, elements in pool_of(2)(sent, wire_dtype):
        # An all-reduce over 2 ranks sends its own size. In the first iteration they also compare
        # two int64; in the second DDP tells of the buckets that it has built again.
        assert counted[0] == reported + 16
        assert counted[2] == reported
        matrices = 20 * 24 + 24 * 24 + 24 * 16
        blocks = 24 * 3 + 24 * 3 + 16 * 3  # rows of 20 have a ragged third block
        assert reported == width * (elements - matrices + blocks * RANK)


def test_the_report_says_what_travels_as_it_is() -> None:
    model = Small()
    model.norm.requires_grad_(False)
    report = FloraState(model.named_parameters(), rank=2, block=8).report()
    assert [(row.name, row.how) for row in report.rows] == [
        ("first.weight", "sketched, 2 per block of 8"),
        ("first.bias", "dense: 1-D"),
        ("extra.weight", "sketched, 2 per block of 8"),
        ("last.weight", "sketched, 2 per block of 8"),
    ]


def test_parameters_without_names_are_known_by_their_places() -> None:
    report = FloraState(Small().parameters(), rank=2, block=8).report()
    assert [row.name for row in report.rows] == [f"#{place}" for place in range(6)]
