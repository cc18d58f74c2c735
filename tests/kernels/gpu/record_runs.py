# SPDX-License-Identifier: Apache-2.0
"""Gradients added to records by the Triton kernel, beside the same by torch's operators.

    TRITON_INTERPRET=1 python -m tests.kernels.gpu.record_runs --cases 100 --seed 0

Gradients are whole numbers, and entries of A are 1 and -1: sums have the same bits in any order, so
the records must be equal in every bit. The exit code is 1 where any differs.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from flora_dist.core.records import Code
from flora_dist.core.sketch.quantise import LEVEL_BITS, read_by_torch
from flora_dist.kernels.gpu.recorded import add_by_torch_, add_records_by_triton_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MICRO_BATCHES = 2
_LAWS = [(16, 16), (9, 16), (32, 32), (3, 64)]


def difference(seed: int, device: str) -> str:
    """What of a random run's records differs in a bit; empty if nothing."""
    draw, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    rank, block = draw.choice(_LAWS)
    code = Code(bits=draw.choice([8, 4, 2, 1]), numbers=rank)
    dtype = draw.choice([torch.bfloat16, torch.float16, torch.float32])
    matrices, rows, columns = (
        draw.randint(1, 2),
        draw.randint(1, 20),
        draw.randint(1, 3 * block // 2),
    )
    blocks = -(-columns // block)
    signs = torch.randint(0, 2, (matrices, rank, block), generator=numbers)
    sketch_ERB = (2.0 * signs - 1).to(device)
    lines = matrices * rows
    cut = draw.randint(0, lines)
    # Lines of two stretches of the whole parameter, the second beyond 32 bits.
    runs = tuple(
        run for run in ((7, 7 + cut), (1 << 33, (1 << 33) + lines - cut)) if run[0] < run[1]
    )
    place = [draw.randint(-(1 << 63), (1 << 63) - 1), rank * draw.randint(0, 3), 9 * rank]
    made = [
        torch.zeros(matrices, rows, blocks, code.bytes, dtype=torch.uint8, device=device)
        for _ in range(2)
    ]
    for count in range(MICRO_BATCHES):
        gradient_ENW = torch.randint(-8, 9, (matrices, rows, columns), generator=numbers)
        given = gradient_ENW.to(device=device, dtype=dtype)
        if draw.random() < 0.2:
            given[0, 0, 0] = torch.inf
        own = () if count == 0 and code.bits in LEVEL_BITS else runs
        add_records_by_triton_(made[0], given, sketch_ERB, 1.0, code, own, place)
        add_by_torch_(made[1], given, sketch_ERB, code, own, place)
    what = f"{code} of {block}, {dtype}, {matrices} x {rows} x {columns}"
    return f"{what}: {wrong} blocks" if (wrong := _parted(*made, code)) else ""


def _parted(found: Tensor, expected: Tensor, code: Code) -> int:
    """Blocks that differ in a bit; what is not finite has no bits that must be equal."""
    is_finite = [
        read_by_torch(each, code, torch.float32).isfinite().all(-1) for each in (found, expected)
    ]
    differs = (found != expected).any(-1) & is_finite[1]
    return int((differs | (is_finite[0] != is_finite[1])).sum())


def wrong_records(device: str, seeds: Iterable[int]) -> list[str]:
    """Which random runs differ; empty if none does."""
    return [f"seed {seed}: {what}" for seed in seeds if (what := difference(seed, device))]


def main() -> int:
    """Print each run that differs; the exit code is 1 if any does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    wrong = wrong_records(DEVICE, range(parsed.seed, parsed.seed + parsed.cases))
    print("\n".join([*wrong, f"{parsed.cases} cases on {DEVICE}, {len(wrong)} broken"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
