# SPDX-License-Identifier: Apache-2.0
"""Gradients of CUDA tensors added to their sketches by Triton. Imports none until one is.

Shape suffixes: E matrices, N rows, W columns, K blocks, B block, R rank.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from flora_dist.core.sketch import ops
from flora_dist.core.sketch.matrices import entry_scale, sketch_matrices
from flora_dist.kernels.gpu.choice import is_wanted, without_triton
from flora_dist.kernels.gpu.cover import are_sizes_covered
from flora_dist.kernels.tables import DTYPES

LARGEST_DISTANCE = 1e-5
"""Of the norm: sums of float32 taken in another order part by some 1e-7 of what is summed."""


def gpu_sketches(
    sums_ENKR: Tensor, gradient_ENW: Tensor, sketch_ERB: Tensor, first_column: int
) -> bool:
    """Whether Triton's kernel is asked for, covers these and does so rightly on this device."""
    if not (sums_ENKR.is_cuda and gradient_ENW.is_cuda and is_wanted()) or without_triton():
        return False
    rank, block = sketch_ERB.shape[1:]
    return (
        sums_ENKR.dtype == torch.float32
        and gradient_ENW.dtype in DTYPES
        and are_sizes_covered(rank, block)
        and first_column % block == 0
        and not fault(gradient_ENW.dtype, rank, block, sums_ENKR.device)
    )


def add_by_triton_(
    sums_ENKR: Tensor, gradient_ENW: Tensor, sketch_ERB: Tensor, scale: float
) -> None:
    """C += G A^T; ``scale`` is in every entry of A, and bfloat16 holds A over it exactly."""
    from flora_dist.kernels.gpu.sketches import add_sketch_

    parts = zip(sums_ENKR, gradient_ENW.contiguous(), sketch_ERB / scale, strict=True)
    for sums_NKR, gradient_NW, unit_RB in parts:
        add_sketch_(sums_NKR, gradient_NW, unit_RB, scale=scale)


@functools.cache
def fault(dtype: torch.dtype, rank: int, block: int, device: torch.device) -> str:
    """What the kernel gets wrong on this device, warned of once; empty if nothing."""
    try:
        what = _difference(dtype, rank, block, device)
    except Exception as error:  # whatever a compiler, a driver or a launch raises
        what = f"does not run: {type(error).__name__}: {error}"
    if what:
        warnings.warn(
            f"the Triton kernel accumulate must sketch as torch's operators do; on {device}, of "
            f"gradients in {dtype} at rank {rank} of {block}, it {what}. Torch's operators sketch "
            "these. Unset FLORA_DIST_GPU_KERNELS, and report this with the names of the GPU and of "
            "Triton's version.",
            RuntimeWarning,
            stacklevel=2,
        )
    return what


def _difference(dtype: torch.dtype, rank: int, block: int, device: torch.device) -> str:
    draw = torch.Generator().manual_seed(0)
    shape = (2, 37, 5 * block - 3)  # more rows than a program takes, and a last block that is cut
    gradient_ENW = torch.randn(shape, generator=draw).to(device=device, dtype=dtype)
    sketch_ERB = sketch_matrices(
        "rademacher", keys=[1, 2], rank=rank, block=block, dtype=torch.float32, device=device
    )
    expected_ENKR = torch.ones((*shape[:2], 5, rank), device=device)
    found_ENKR = expected_ENKR.clone()
    ops.add_compressed_(expected_ENKR, gradient_ENW.float(), sketch_ERB)
    add_by_triton_(found_ENKR, gradient_ENW, sketch_ERB, entry_scale("rademacher", rank=rank))
    distance = ((found_ENKR - expected_ENKR).norm() / expected_ENKR.norm()).item()
    return "" if distance <= LARGEST_DISTANCE else f"parts by {distance:.1e} of the sum"
