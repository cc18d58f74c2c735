# SPDX-License-Identifier: Apache-2.0
"""ZeRO 0 to 3 with gradients in few bits: the records and the step of DDP on as many ranks."""

from __future__ import annotations

import pytest

from tests.conftest import launched_pool_of
from tests.zero.few_bits import compared

pytestmark = pytest.mark.deepspeed

CLOSE = 1e-6
"""Of weights around 0.1 after one step of 1e-2; fp32 in another order."""

TINY = 1e-6
"""MiB: every parameter in a message of its own, all but the last sent during backward."""


@pytest.mark.parametrize(
    ("world_size", "stage", "bits", "wire_bits", "cap"),
    [
        (2, 0, 4, 4, TINY),
        (2, 1, 4, 1, None),
        (2, 2, 4, 1, TINY),
        (3, 2, 8, 2, None),
        (3, 3, 4, 4, TINY),
    ],
)
def test_an_engine_has_the_records_of_ddp(
    world_size: int, stage: int, bits: int, wire_bits: int, cap: float | None
) -> None:
    everyone = launched_pool_of(world_size)(compared, stage, bits, wire_bits, cap)
    for kept, differing, farthest in everyone:
        assert kept > 0
        assert differing == 0
        assert farthest < CLOSE


def test_another_record_is_seen() -> None:
    for kept, differing, _ in launched_pool_of(3)(compared, 2, 4, 4, None, "owner's sum"):
        assert differing > kept / 2
