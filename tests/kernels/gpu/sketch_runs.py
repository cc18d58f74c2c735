# SPDX-License-Identifier: Apache-2.0
"""Sketches of rows by the Triton kernel, beside core/sketch/ops.py."""

from __future__ import annotations

import itertools

import torch

from flora_dist.core.sketch import ops
from flora_dist.kernels.gpu.sketches import add_sketch_, sketch_rows

# Of the norm: X in three parts of bfloat16 has 24 bits, and sums of fp32 lose some of them.
LARGEST_DISTANCE = 1e-6
# A result in bfloat16 is rounded to 2^-8 of its size.
LARGEST_BF16_DISTANCE = 2.0**-8


def wrong_sketches(device: str) -> list[str]:
    """Which sketches part; empty if none does."""
    wrong = []
    draw = torch.Generator().manual_seed(0)
    shapes, laws = [(33, 100), (5, 64)], [(8, 64), (3, 16)]
    for (rows, columns), (rank, block), dtype in itertools.product(
        shapes, laws, (torch.bfloat16, torch.float32)
    ):
        x = torch.randn(rows, columns, generator=draw).to(device=device, dtype=dtype)
        unit = torch.randn(rank, block, generator=draw).sign().to(device)
        before = torch.randn(rows, -(-columns // block), rank, generator=draw).to(device)
        scale = rank**-0.5
        sketched = ops.compress(x.float().unsqueeze(0), scale * unit.unsqueeze(0))[0]
        added = before.clone()
        add_sketch_(added, x, unit, scale=scale)
        alone = sketch_rows(x, unit, scale=scale)
        assert alone.dtype == dtype
        largest = LARGEST_BF16_DISTANCE if dtype == torch.bfloat16 else LARGEST_DISTANCE
        name = f"{rows} x {columns}, rank {rank} of {block}, {dtype}"
        if not _distance(added, before + sketched) <= LARGEST_DISTANCE:
            wrong.append(f"added, {name}")
        if not _distance(alone.float(), sketched.flatten(1)) <= largest:
            wrong.append(f"alone, {name}")
    return wrong


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
