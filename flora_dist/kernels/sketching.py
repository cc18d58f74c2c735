# SPDX-License-Identifier: Apache-2.0
"""Gradients added to their sketches, C += G A^T, by whichever kernels cover it.

Shape suffixes: E matrices, N rows, W columns here, K blocks, B block, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flora_dist.core.sketch import ops
from flora_dist.kernels.gpu.sketched import add_by_triton_, gpu_sketches
from flora_dist.kernels.library import found
from flora_dist.kernels.tables import DTYPES, LARGEST_SKETCH


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSketch:
    """How rows are sketched."""

    matrices_ERB: Tensor
    """A, in the dtype of C."""
    first_column: int
    """Place of the rows' first column in the whole row."""
    is_hadamard: bool
    """Whether A is some rows of a Hadamard matrix, times signs and one number."""
    scale: float
    """In every entry of A; bfloat16 holds A over it exactly."""


def add_sketched_(sums_ENKR: Tensor, gradient_ENW: Tensor, sketch: RowSketch) -> None:
    """C += G A^T, in the precision of C. Both ways give the same to rounding.

    Args:
        sums_ENKR: contiguous; all blocks that the columns touch.
        gradient_ENW: columns of the rows, in any dtype; the kernels read it as it comes.
        sketch: how they are sketched.
    """
    assert sums_ENKR.is_contiguous(), sums_ENKR.shape
    sketch_ERB, first_column = sketch.matrices_ERB, sketch.first_column
    if sums_ENKR.is_cuda and gpu_sketches(sums_ENKR, gradient_ENW, sketch_ERB, first_column):
        add_by_triton_(sums_ENKR, gradient_ENW, sketch_ERB, sketch.scale)
        return
    covers = sums_ENKR.dtype == torch.float32 and kernels_cover(gradient_ENW, sketch_ERB)
    operators = found().operators if covers else None
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
        sketch.is_hadamard,
    )


def kernels_cover(gradient_ENW: Tensor, sketch_ERB: Tensor) -> bool:
    """Whether the CPU's kernels read such gradients, and multiply by such matrices."""
    rank, block = sketch_ERB.shape[1:]
    return (
        sketch_ERB.dtype == torch.float32
        and gradient_ENW.dtype in DTYPES
        and sketch_ERB.is_cpu
        and gradient_ENW.is_cpu
        and rank * block <= LARGEST_SKETCH
    )
