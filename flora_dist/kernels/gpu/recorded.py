# SPDX-License-Identifier: Apache-2.0
"""Gradients of CUDA tensors added to records by Triton. Imports none until one is.

Shape suffixes: E matrices, N rows, W columns, K blocks, B block, R rank, O bytes of a record.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from flora_dist.core.records import FEW_BITS, Code
from flora_dist.core.sketch import ops
from flora_dist.core.sketch.matrices import sketch_matrices
from flora_dist.core.sketch.philox import grid16
from flora_dist.core.sketch.quantise import (
    LEVEL_BITS,
    level_records,
    read_records,
    round_records,
)
from flora_dist.core.tiles import Interval
from flora_dist.kernels.gpu.choice import is_wanted, without_triton
from flora_dist.kernels.gpu.cover import are_sizes_covered
from flora_dist.kernels.tables import DTYPES


def gpu_records(
    records_ENKO: Tensor, gradient_ENW: Tensor, sketch_ERB: Tensor, first_column: int, code: Code
) -> bool:
    """Whether Triton's kernel is asked for, covers these and does so rightly on this device."""
    if not (records_ENKO.is_cuda and gradient_ENW.is_cuda and is_wanted()) or without_triton():
        return False
    return covers(gradient_ENW.dtype, sketch_ERB, first_column, code) and not fault(
        gradient_ENW.dtype, *sketch_ERB.shape[1:], code.bits, records_ENKO.device
    )


def covers(dtype: torch.dtype, sketch_ERB: Tensor, first_column: int, code: Code) -> bool:
    """Whether there is a kernel for such gradients, sketches and records."""
    rank, block = sketch_ERB.shape[1:]
    return (
        sketch_ERB.dtype == torch.float32
        and dtype in DTYPES
        and code.bits in FEW_BITS
        and are_sizes_covered(rank, block)
        and first_column % block == 0
    )


def add_records_by_triton_(
    records_ENKO: Tensor,
    gradient_ENW: Tensor,
    sketch_ERB: Tensor,
    scale: float,
    code: Code,
    runs: Sequence[Interval],
    place: Sequence[int],
) -> None:
    """C <- Q(C + G A^T).

    Args:
        records_ENKO: contiguous; all blocks that the columns touch, the first one whole.
        gradient_ENW: in a dtype that the kernels read.
        sketch_ERB: A.
        scale: in every entry of A; bfloat16 holds A over it exactly.
        code: how C is written.
        runs: of the whole parameter's lines, one after the other, that these rows are; empty:
            nothing is there yet, and G A^T is put at levels.
        place: key of the random bits, signed; the lines' first number, and numbers of a line.
    """
    from flora_dist.kernels.gpu.adding import RecordSketch, add_

    unit_ERB = (sketch_ERB / scale).to(torch.bfloat16).contiguous()
    sketch = RecordSketch(unit_ERB=unit_ERB, scale=scale, code=code)
    add_(records_ENKO, gradient_ENW.contiguous(), sketch, runs, place)


@functools.cache
def fault(dtype: torch.dtype, rank: int, block: int, bits: int, device: torch.device) -> str:
    """What the kernel gets wrong on this device, warned of once; empty if nothing."""
    try:
        what = _difference(dtype, Code(bits=bits, numbers=rank), block, device)
    except Exception as error:  # whatever a compiler, a driver or a launch raises
        what = f"does not run: {type(error).__name__}: {error}"
    if what:
        warnings.warn(
            f"the Triton kernel add_records must write what torch's operators do; on {device}, of "
            f"gradients in {dtype} at rank {rank} of {block} in {bits} bits, it {what}. Torch's "
            "operators write these. Unset FLORA_DIST_GPU_KERNELS, and report this with the names "
            "of the GPU and of Triton's version.",
            RuntimeWarning,
            stacklevel=2,
        )
    return what


def _difference(dtype: torch.dtype, code: Code, block: int, device: torch.device) -> str:
    """Whole numbers, whose sums have the same bits in any order: so must the records."""
    draw = torch.Generator().manual_seed(0)
    shape = (2, 37, 5 * block - 3)  # more rows than a program takes, and a last block that is cut
    sketch_ERB = sketch_matrices(
        "rademacher",
        keys=[1, 2],
        rank=code.numbers,
        block=block,
        dtype=torch.float32,
        device=device,
    ).sign()
    made = [
        torch.zeros((*shape[:2], 5, code.bytes), dtype=torch.uint8, device=device) for _ in range(2)
    ]
    # 16-bit numbers hold such whole ones.
    for count in range(2):
        gradient_ENW = torch.randint(-8, 9, shape, generator=draw).to(device=device, dtype=dtype)
        begins = count == 0 and code.bits in LEVEL_BITS
        runs = () if begins else ((5, 5 + shape[0] * shape[1]),)
        place = (-0x123456789ABCDEF, 8, 6 * code.numbers)
        add_records_by_triton_(made[0], gradient_ENW, sketch_ERB, 1.0, code, runs, place)
        add_by_torch_(made[1], gradient_ENW, sketch_ERB, code, runs, place)
    differ = int((made[0] != made[1]).any(-1).sum())
    return f"parts in {differ} of {made[0].shape[:3].numel()} blocks" if differ else ""


def add_by_torch_(
    records_ENKO: Tensor,
    gradient_ENW: Tensor,
    sketch_ERB: Tensor,
    code: Code,
    runs: Sequence[Interval],
    place: Sequence[int],
) -> None:
    """The same by torch's operators."""
    numbers_ENKR = sketch_ERB.new_zeros(*records_ENKO.shape[:3], code.numbers)
    ops.add_compressed_(numbers_ENKR, gradient_ENW.to(sketch_ERB.dtype), sketch_ERB)
    if not runs:
        records_ENKO.copy_(level_records(numbers_ENKR, code))
        return
    key, first, count = place
    columns = (first, first + records_ENKO.shape[2] * code.numbers)
    drawn = [
        grid16(
            key % (1 << 64),
            rows=rows,
            columns=columns,
            num_columns=count,
            device=records_ENKO.device,
        )
        for rows in runs
    ]
    numbers_ENKR += read_records(records_ENKO, code, sketch_ERB.dtype)
    bits = torch.cat(drawn).view(numbers_ENKR.shape)
    records_ENKO.copy_(round_records(numbers_ENKR, bits, code))
