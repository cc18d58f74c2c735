# SPDX-License-Identifier: Apache-2.0
"""Sums of gradients in few bits wear: each micro-batch rounds what came before it once more."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from flora_dist.gradients.accumulator import Accumulator

MOST_ROUNDINGS = {1: 1, 2: 4, 4: 64}
"""Micro-batches, by bits, up to which what rounding adds to a sum stays near the sum itself or
below (``python -m tests.bench.requantised``); 8 bits have no such number."""


def warn_of_wear(accumulators: Sequence[Accumulator]) -> None:
    """Warn where rounding after every micro-batch adds more error than the bits save."""
    for each in accumulators:
        bits = 0 if each.code is None else each.code.bits
        if each.num_added <= MOST_ROUNDINGS.get(bits, each.num_added):
            continue
        warnings.warn(
            f"sums of gradients are rounded to {bits} bits after every micro-batch; "
            f"those of {each.name!r} were {each.num_added} times in this step, which adds more "
            "error than the bits save. Pass gradient_bits=4, or 8 beyond 64 micro-batches, and "
            "wire_bits as they are.",
            stacklevel=2,
        )
        return
