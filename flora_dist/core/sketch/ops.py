# SPDX-License-Identifier: Apache-2.0
"""Compress and expand: the one door between the optimizer and how a sketch is applied.

    c = blocks(x) A^T      compress
    x' = c A               expand
    c A_old A_new^T        change of basis

Legend: E matrices in the batch, N rows, W columns given, K blocks per row, B block, R rank of the
sketch. Blocks are B consecutive columns, aligned at column 0 of the whole matrix; a rectangle that
begins at `first_column` touches the blocks from first_column // B to ceil((first_column + W) / B).

All products are `bmm` over (E, N K, .): no batch dimension is broadcast, so A is never copied, and
with E = 1 it is as fast as `mm`. A^T stays a transposed view: a copy of it was half as fast on CPU.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Elements of some rows inside whole blocks, so that products need no copy of them."""

    elements_ENW: Tensor
    """A view of `whole_ENM`, where the rows do not fill their blocks."""
    whole_ENM: Tensor
    """Contiguous; zeros around the elements until something is added in place."""


def make_room(like_ENW: Tensor, block: int, *, first_column: int) -> Blocks:
    """Memory for the elements of some rows, to be filled in, and zeros up to whole blocks.

    Args:
        like_ENW: of the same shape, dtype and device.
        block: columns of a block.
        first_column: column of the whole matrix at which the elements begin.
    """
    matrices, rows, width = like_ENW.shape
    before = first_column % block
    total = _blocks_touched(width, block, first_column) * block
    whole_ENM = like_ENW.new_empty(matrices, rows, total)
    if total == width:
        return Blocks(elements_ENW=whole_ENM, whole_ENM=whole_ENM)
    whole_ENM[..., :before] = 0
    whole_ENM[..., before + width :] = 0
    elements_ENW = whole_ENM.narrow(-1, before, width)
    return Blocks(elements_ENW=elements_ENW, whole_ENM=whole_ENM)


def compress_blocks(x: Blocks, sketch_ERB: Tensor) -> Tensor:
    """Sketches each block of each row, c = blocks(x) A^T (E, N, K, R); A is (E, R, B)."""
    matrices, rows, width = x.whole_ENM.shape
    rank, block = sketch_ERB.shape[1:]
    flat = x.whole_ENM.view(matrices, -1, block)
    return torch.bmm(flat, sketch_ERB.mT).view(matrices, rows, width // block, rank)


def add_expanded_(
    x: Blocks, c_ENKR: Tensor, sketch_ERB: Tensor, *, keep: float, factor: float
) -> None:
    """X <- keep x + factor c A, in one pass over the elements; A is (E, R, B)."""
    matrices = x.whole_ENM.shape[0]
    rank, block = sketch_ERB.shape[1:]
    flat = c_ENKR.reshape(matrices, -1, rank)
    blocks = x.whole_ENM.view(matrices, -1, block)
    blocks.baddbmm_(flat, sketch_ERB, beta=keep, alpha=factor)


def compress(x_ENM: Tensor, sketch_ERB: Tensor, *, first_column: int = 0) -> Tensor:
    """Sketches each block of each row: c = blocks(x) A^T.

    Args:
        x_ENM: (E, N, W), columns [first_column, first_column + W) of the rows. What a touched
            block holds outside of them counts as zero.
        sketch_ERB: (E, R, B), one sketch matrix per matrix, in the dtype of `x_ENM`.
        first_column: column of the whole matrix at which `x_ENM` begins.

    Returns:
        (E, N, K, R), K the number of touched blocks.
    """
    matrices, rows, _ = x_ENM.shape
    rank, block = sketch_ERB.shape[1:]
    blocks_ENM = _whole_blocks(x_ENM, block, first_column)
    per_row = blocks_ENM.shape[-1] // block
    flat = blocks_ENM.reshape(matrices, rows * per_row, block)
    return torch.bmm(flat, sketch_ERB.mT).view(matrices, rows, per_row, rank)


def add_compressed_(
    c_ENKR: Tensor, x_ENM: Tensor, sketch_ERB: Tensor, *, first_column: int = 0
) -> None:
    """Adds the sketch of each block of each row: c += blocks(x) A^T.

    Args:
        c_ENKR: (E, N, K, R), contiguous; all blocks that the columns touch.
        x_ENM: (E, N, W), as given to `compress`.
        sketch_ERB: (E, R, B), in the dtype of `c_ENKR` and `x_ENM`.
        first_column: column of the whole matrix at which `x_ENM` begins.
    """
    matrices, rows, per_row, rank = c_ENKR.shape
    block = sketch_ERB.shape[-1]
    assert per_row == _blocks_touched(x_ENM.shape[-1], block, first_column), c_ENKR.shape
    blocks_ENM = _whole_blocks(x_ENM, block, first_column)
    flat = blocks_ENM.reshape(matrices, rows * per_row, block)
    c_ENKR.view(matrices, rows * per_row, rank).baddbmm_(flat, sketch_ERB.mT)


def expand(
    c_ENKR: Tensor, sketch_ERB: Tensor, *, num_columns: int, first_column: int = 0
) -> Tensor:
    """Estimates rows from their sketches: x' = c A, cut to the columns asked for.

    Args:
        c_ENKR: (E, N, K, R), all blocks that the columns touch.
        sketch_ERB: (E, R, B), as given to `compress`.
        num_columns: how many columns to return.
        first_column: column of the whole matrix at which the result begins.

    Returns:
        (E, N, num_columns); a view into whole blocks where the columns do not fill them.
    """
    matrices, rows, per_row, rank = c_ENKR.shape
    block = sketch_ERB.shape[-1]
    assert per_row == _blocks_touched(num_columns, block, first_column), c_ENKR.shape
    flat = c_ENKR.reshape(matrices, rows * per_row, rank)
    x_ENM = torch.bmm(flat, sketch_ERB).view(matrices, rows, per_row * block)
    return x_ENM.narrow(-1, first_column % block, num_columns)


def change_basis(c_ENKR: Tensor, old_ERB: Tensor, new_ERB: Tensor) -> Tensor:
    """Moves sketches to another basis without expanding them: c (A_old A_new^T).

    Args:
        c_ENKR: (E, N, K, R_old).
        old_ERB: (E, R_old, B), the sketch matrices that made `c_ENKR`.
        new_ERB: (E, R_new, B).

    Returns:
        (E, N, K, R_new), unscaled: see `matrices.shrink_factor`.
    """
    matrices, rows, per_row, rank = c_ENKR.shape
    flat = c_ENKR.reshape(matrices, rows * per_row, rank)
    moved = torch.bmm(flat, torch.bmm(old_ERB, new_ERB.mT))
    return moved.view(matrices, rows, per_row, new_ERB.shape[1])


def _blocks_touched(num_columns: int, block: int, first_column: int) -> int:
    return -(-(first_column + num_columns) // block) - first_column // block


def _whole_blocks(x_ENM: Tensor, block: int, first_column: int) -> Tensor:
    """`x_ENM` with zeros on both sides up to whole blocks; itself where nothing is missing."""
    matrices, rows, width = x_ENM.shape
    before = first_column % block
    total = _blocks_touched(width, block, first_column) * block
    if total == width:
        return x_ENM
    # Not torch.nn.functional.pad: it first fills the whole result, one more pass over memory.
    padded = x_ENM.new_empty(matrices, rows, total)
    padded[..., :before] = 0
    padded[..., before : before + width] = x_ENM
    padded[..., before + width :] = 0
    return padded


@contextmanager
def exact_products(device_types: Iterable[str]) -> Iterator[None]:
    """Switch autocast, TF32 and bf16 products off; restore them after.

    Column sums and sketches are matrix products. Autocast would take them in bf16, and
    ``torch.set_float32_matmul_precision("high")`` in TF32: 1e-3 off, without a word.
    """
    cpu: Any = torch.backends.mkldnn  # torch's stubs do not know its attributes
    backends = (torch.backends.cuda.matmul, cpu.matmul)
    before = [backend.fp32_precision for backend in backends]
    with ExitStack() as stack:
        for device_type in sorted(set(device_types)):
            if torch.amp.is_autocast_available(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
