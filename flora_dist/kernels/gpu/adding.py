# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernel that adds gradients to records.

Shape suffixes: E matrices, N rows, W columns, K blocks, B block, R rank, O bytes of a record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flora_dist.core.records import Code
from flora_dist.core.sketch.quantise import LEVEL_BITS, level_tables, value_table
from flora_dist.core.tiles import Interval
from flora_dist.kernels.gpu.place import on
from flora_dist.kernels.gpu.records import add_records
from flora_dist.kernels.gpu.shapes import RECORD_OPTIONS, RECORD_ROWS, SMALLEST_PRODUCT

_GROUP = 4
"""Blocks of a program."""
_ADDS, _BEGINS = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSketch:
    """How gradients are sketched, and how the sketches are written."""

    unit_ERB: Tensor
    """A over ``scale``, in bfloat16, which holds it exactly."""
    scale: float
    code: Code


def add_(
    records_ENKO: Tensor,
    gradient_ENW: Tensor,
    sketch: RecordSketch,
    runs: Sequence[Interval],
    place: Sequence[int],
) -> None:
    """C <- Q(C + G A^T); ``recorded.add_records_by_triton_`` says what is what."""
    with on(records_ENKO.device):
        if not runs:
            _launch(records_ENKO, gradient_ENW, sketch, 0, place, _BEGINS)
        for own, line in _stretches(runs, *gradient_ENW.shape[:2]):
            part = RecordSketch(
                unit_ERB=sketch.unit_ERB[own[0]], scale=sketch.scale, code=sketch.code
            )
            _launch(records_ENKO[own], gradient_ENW[own], part, line, place, _ADDS)


def _stretches(
    runs: Sequence[Interval], matrices: int, rows: int
) -> Iterator[tuple[tuple[slice, slice], int]]:
    """What one launch takes, and its first line: following lines of whole matrices, or of one."""
    if len(runs) == 1:
        yield (slice(0, matrices), slice(0, rows)), runs[0][0]
        return
    here = 0
    for first, last in runs:
        stop = here + last - first
        for matrix in range(here // rows, -(-stop // rows)):
            start, end = max(here, matrix * rows), min(stop, (matrix + 1) * rows)
            own = slice(start - matrix * rows, end - matrix * rows)
            yield (slice(matrix, matrix + 1), own), first + start - here
        here = stop


def _launch(
    records_ENKO: Tensor,
    gradient_ENW: Tensor,
    sketch: RecordSketch,
    line: int,
    place: Sequence[int],
    how: int,
) -> None:
    matrices, rows, columns = gradient_ENW.shape
    if gradient_ENW.numel() == 0:
        return
    blocks, (rank, block), bits = records_ENKO.shape[2], sketch.unit_ERB.shape[1:], sketch.code.bits
    device, (key, first, count) = records_ENKO.device, place
    # Eight bits are never put at levels; the kernel asks for a table all the same.
    levels, edges = level_tables(bits if bits in LEVEL_BITS else 1, torch.float32, device)
    add_records[(triton.cdiv(rows, RECORD_ROWS), triton.cdiv(blocks, _GROUP), matrices)](
        gradient_ENW,
        sketch.unit_ERB,
        records_ENKO,
        value_table(bits, torch.float32, device),
        levels,
        edges,
        sketch.scale,
        _signed(key),
        key >> 32,
        line,
        first,
        count,
        rows,
        columns,
        blocks,
        ROWS=RECORD_ROWS,
        BLOCK=block,
        RANK=rank,
        PADDED=max(SMALLEST_PRODUCT, triton.next_power_of_2(rank)),
        GROUP=_GROUP,
        BITS=bits,
        BEGINS=how,
        **RECORD_OPTIONS,
    )


def _signed(key: int) -> int:
    """The lower half of a key as a number of 32 bits."""
    low = key & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low
