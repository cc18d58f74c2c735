# SPDX-License-Identifier: Apache-2.0
"""Sketches and rounded weights as a device makes them, beside the CPU's."""

from __future__ import annotations

import torch

from flora_dist.core.sketch.matrices import KINDS, sketch_matrices
from flora_dist.core.sketch.philox import grid16, grid_signs


def other_bits(device: str) -> list[str]:
    """What differs from the CPU's in any bit; empty where nothing does."""
    wrong = []
    for grid in (grid16, grid_signs):
        made = [
            grid(7, rows=(2, 50), columns=(17, 901), num_columns=1000, device=where).cpu()
            for where in ("cpu", device)
        ]
        if not torch.equal(*made):
            wrong.append(grid.__name__)
    for kind in KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            drawn = [
                sketch_matrices(
                    kind, keys=[3, 1 << 63], rank=8, block=64, dtype=dtype, device=where
                ).cpu()
                for where in ("cpu", device)
            ]
            if not torch.equal(*drawn):
                wrong.append(f"{kind} sketches in {dtype}")
    return wrong
