# SPDX-License-Identifier: Apache-2.0
"""Gradients added to their sketches, C += G A^T, by whichever kernels cover it.

Shape suffixes: E matrices, N rows, W columns here, K blocks, B block, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flora_dist.core.sketch import ops
from flora_dist.kernels.gpu.sketched import add_by_triton_, gpu_sketches
from flora_dist.kernels.library import found
from flora_dist.kernels.tables import DTYPES, LARGEST_SKETCH


def add_sketched_(
    sums_ENKR: Tensor,
    gradient_ENW: Tensor,
    sketch_ERB: Tensor,
    *,
    first_column: int,
    is_hadamard: bool,
    scale: float,
) -> None:
    """C += G A^T, in the precision of C. Both ways give the same to rounding.

    Args:
        sums_ENKR: contiguous; all blocks that the columns touch.
        gradient_ENW: columns of the rows, in any dtype; the kernels read it as it comes.
        sketch_ERB: the sketch matrices, in the dtype of C.
        first_column: place of the first column in the whole row.
        is_hadamard: whether A is some rows of a Hadamard matrix, times signs and one number.
        scale: in every entry of A; bfloat16 holds A over it exactly.
    """
    assert sums_ENKR.is_contiguous(), sums_ENKR.shape
    if sums_ENKR.is_cuda and gpu_sketches(sums_ENKR, gradient_ENW, sketch_ERB, first_column):
        add_by_triton_(sums_ENKR, gradient_ENW, sketch_ERB, scale)
        return
    operators = found().operators if _covers(sums_ENKR, gradient_ENW, sketch_ERB) else None
    if operators is None:
        rows_ENW = gradient_ENW.to(sums_ENKR.dtype)
        ops.add_compressed_(sums_ENKR, rows_ENW, sketch_ERB, first_column=first_column)
        return
    operators.accumulate(
        sums_ENKR,
        gradient_ENW.contiguous(),
        sketch_ERB.contiguous(),
        DTYPES[gradient_ENW.dtype],
        first_column,
        is_hadamard,
    )


def _covers(sums_ENKR: Tensor, gradient_ENW: Tensor, sketch_ERB: Tensor) -> bool:
    rank, block = sketch_ERB.shape[1:]
    return (
        sums_ENKR.dtype == sketch_ERB.dtype == torch.float32
        and gradient_ENW.dtype in DTYPES
        and sums_ENKR.is_cpu
        and gradient_ENW.is_cpu
        and rank * block <= LARGEST_SKETCH
    )
