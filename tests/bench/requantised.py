# SPDX-License-Identifier: Apache-2.0
"""What rounding a sum after every micro-batch adds to it.

    python -m tests.bench.requantised        seconds of one core

Micro-batches are normal numbers, a part of which all share: ``signal`` of each one's energy. Given
is |C - exact|^2 / |exact|^2 of the sum, beside the error that ranks below the block have for the
same bytes in 32 bits, whatever the number of micro-batches.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from flora_dist.core.records import Code
from flora_dist.core.sketch.philox import grid16
from flora_dist.core.sketch.quantise import (
    LEVEL_BITS,
    level_records,
    read_records,
    round_records,
)

BLOCK, BLOCKS = 64, 1000
MICRO_BATCHES = (1, 4, 16, 64)
BITS = (8, 4, 2, 1)
SIGNALS = (0.5, 0.1)


def error(bits: int, micro_batches: int, signal: float) -> float:
    """Of the sum of so many micro-batches, each added in few bits."""
    generator = torch.Generator().manual_seed(micro_batches)
    code = Code(bits=bits, numbers=BLOCK)
    shared = signal**0.5 * torch.randn(BLOCKS, BLOCK, generator=generator)
    exact = torch.zeros(BLOCKS, BLOCK)
    records: Tensor | None = None
    for number in range(micro_batches):
        noise = torch.randn(BLOCKS, BLOCK, generator=generator)
        gradient = shared + (1 - signal) ** 0.5 * noise
        exact += gradient
        if records is None and bits in LEVEL_BITS:
            records = level_records(gradient, code)
            continue
        if records is not None:
            gradient = gradient + read_records(records, code, torch.float32)
        u = grid16(number, rows=(0, BLOCKS), columns=(0, BLOCK), num_columns=BLOCK, device="cpu")
        records = round_records(gradient, u, code)
    assert records is not None
    kept = read_records(records, code, torch.float32)
    return ((kept - exact).square().sum() / exact.square().sum()).item()


def main() -> int:
    """Print the table."""
    heads = "  ".join(f"{number:>8} mb" for number in MICRO_BATCHES)
    print(f"bits  signal  {heads}   same bytes, 32 bits")
    for bits in BITS:
        for signal in SIGNALS:
            errors = "  ".join(f"{error(bits, n, signal):11.4f}" for n in MICRO_BATCHES)
            print(f"{bits:4}  {signal:6.1f}  {errors}   {32 / bits - 1:19.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
