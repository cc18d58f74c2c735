# SPDX-License-Identifier: Apache-2.0
"""Sketches of rows that lie in memory as they are: of gradients, and of a linear layer's input.

Shape suffixes: N rows, M columns, B block, K blocks per row, R rank.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from flora_dist.kernels.gpu.place import on
from flora_dist.kernels.gpu.shapes import MEASURE_OPTIONS, SMALLEST_PRODUCT, TILE_ROWS
from flora_dist.kernels.gpu.sketch import accumulate

_GROUP = 4
"""Blocks of a program."""
_OVERWRITES, _ADDS = 0, 1


def add_sketch_(c_NKR: Tensor, x_NM: Tensor, unit_RB: Tensor, *, scale: float) -> None:
    """C <- C + X A^T with sums in float32, whatever the dtype of X.

    Args:
        c_NKR: contiguous, float32.
        x_NM: contiguous; read as it is, without a copy in float32.
        unit_RB: A over ``scale``, which bfloat16 holds exactly; B a power of two from 16 on.
        scale: of A's entries.
    """
    _launch(c_NKR, x_NM, unit_RB, scale, _ADDS)


def sketch_rows(x_NM: Tensor, unit_RB: Tensor, *, scale: float) -> Tensor:
    """X A^T (N, K R) in the dtype of X: what the next product of a ``fused`` layer reads.

    Args:
        x_NM: contiguous.
        unit_RB: as ``add_sketch_`` takes it.
        scale: of A's entries.
    """
    rank, block = unit_RB.shape
    blocks = triton.cdiv(x_NM.shape[1], block)
    made_NKR = torch.empty((x_NM.shape[0], blocks, rank), dtype=x_NM.dtype, device=x_NM.device)
    _launch(made_NKR, x_NM, unit_RB, scale, _OVERWRITES)
    return made_NKR.flatten(1)


def _launch(out_NKR: Tensor, x_NM: Tensor, unit_RB: Tensor, scale: float, how: int) -> None:
    rank, block = unit_RB.shape
    rows, columns = x_NM.shape
    assert out_NKR.is_contiguous()
    assert x_NM.is_contiguous()
    blocks = triton.cdiv(columns, block)
    if rows == 0:
        return
    with on(x_NM.device):
        accumulate[(triton.cdiv(rows, TILE_ROWS), triton.cdiv(blocks, _GROUP))](
            x_NM,
            unit_RB.to(torch.bfloat16).contiguous(),
            out_NKR,
            scale,
            rows,
            columns,
            blocks,
            ROWS=TILE_ROWS,
            BLOCK=block,
            RANK=rank,
            PADDED=max(SMALLEST_PRODUCT, triton.next_power_of_2(rank)),
            GROUP=_GROUP,
            ADDS=how,
            **MEASURE_OPTIONS,
        )
