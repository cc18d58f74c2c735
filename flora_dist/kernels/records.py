# SPDX-License-Identifier: Apache-2.0
"""Sketches that are kept and sent in few bits, by whichever kernels cover them.

Both ways write the same records, but where a sum in another order has carried a number over the
edge between two values. The native one reads, adds and rounds block by block in a cache.

Shape suffixes: E matrices, N rows, W columns here, K blocks, B block, R rank, L lines (rows of all
matrices), O bytes of a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_dist.core.records import FULL_BITS, Code
from flora_dist.core.sketch.philox import grid16
from flora_dist.core.sketch.quantise import (
    level_records,
    level_tables,
    read_by_torch,
    read_records,
    round_records,
    value_table,
)
from flora_dist.core.tiles import Interval
from flora_dist.kernels.gpu.recorded import add_records_by_triton_, gpu_records
from flora_dist.kernels.library import found
from flora_dist.kernels.sketching import RowSketch, add_sketched_, kernels_cover
from flora_dist.kernels.tables import DTYPES, floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Random bits of some lines: a function of the numbers' places in the whole parameter."""

    key: int
    runs: tuple[Interval, ...]
    """Of the whole parameter's lines, one after the other."""
    columns: Interval
    """Of a line's numbers."""
    num_columns: int
    """Of a whole line's numbers."""

    def bits(self, device: torch.device) -> Tensor:
        """Integers (L, columns) in [0, 65536)."""
        drawn = [
            grid16(
                self.key,
                rows=rows,
                columns=self.columns,
                num_columns=self.num_columns,
                device=device,
            )
            for rows in self.runs
        ]
        return torch.cat(drawn)

    @property
    def place(self) -> tuple[list[int], list[int]]:
        """What the kernels are given: runs, and key, first number and numbers of a line."""
        key = self.key - (1 << 64) if self.key >> 63 else self.key
        return [line for run in self.runs for line in run], [key, self.columns[0], self.num_columns]


def add_to_records_(
    records_ENKO: Tensor, gradient_ENW: Tensor, sketch: RowSketch, code: Code, draws: Draws | None
) -> None:
    """C <- Q(C + G A^T).

    Args:
        records_ENKO: contiguous; all blocks that the columns touch.
        gradient_ENW: columns of the rows, in any dtype; the kernels read it as it comes.
        sketch: how they are sketched; its dtype is that of the arithmetic.
        code: how C is written.
        draws: what sums are rounded by; None: nothing is there yet, and G A^T is put at levels.
    """
    assert records_ENKO.is_contiguous(), records_ENKO.shape
    sketch_ERB, operators = sketch.matrices_ERB, found().operators
    first_column = sketch.first_column
    if gpu_records(records_ENKO, gradient_ENW, sketch_ERB, first_column, code):
        spans = () if draws is None else draws.runs
        where = [0, 0, 0] if draws is None else draws.place[1]
        add_records_by_triton_(
            records_ENKO, gradient_ENW, sketch_ERB, sketch.scale, code, spans, where
        )
        return
    if operators is None or not (sketch.is_hadamard and kernels_cover(gradient_ENW, sketch_ERB)):
        numbers_ENKR = sketch_ERB.new_zeros(*records_ENKO.shape[:3], code.numbers)
        add_sketched_(numbers_ENKR, gradient_ENW, sketch)
        if draws is not None:
            numbers_ENKR += read_records(records_ENKO, code, sketch_ERB.dtype)
        records_ENKO.copy_(_rounded(numbers_ENKR, code, draws))
        return
    matrices, rows = gradient_ENW.shape[:2]
    runs, place = ([0, matrices * rows], [0, 0, 0]) if draws is None else draws.place
    operators.add_records(
        records_ENKO,
        gradient_ENW.contiguous(),
        sketch_ERB.contiguous(),
        DTYPES[gradient_ENW.dtype],
        first_column,
        code.bits,
        table_of(code.bits),
        *_levels(code, draws),
        runs,
        place,
    )


def merged_records(
    sources: Sequence[Tensor],
    kept: Code | None,
    sent: Code,
    draws: Draws | None,
    *,
    divisor: float,
    dtype: torch.dtype,
) -> Tensor:
    """Q(sum / divisor) of sketches, summed in their order: uint8 (L, K, bytes).

    Args:
        sources: (L, K, bytes) records of the same lines; numbers (L, K, R) where ``kept`` is None.
        kept: how the sources are written.
        sent: how the result is.
        draws: what it is rounded by; None: it is put at levels.
        divisor: of the sum.
        dtype: of the arithmetic.
    """
    operators = found().operators
    on_cpu = dtype == torch.float32 and all(each.is_cpu for each in sources)
    if operators is None or not on_cpu:
        sum_LKR = _numbers(sources[0], kept, dtype)
        for source in sources[1:]:
            sum_LKR = sum_LKR + _numbers(source, kept, dtype)
        return _rounded(sum_LKR if divisor == 1 else sum_LKR / divisor, sent, draws)
    given = [each.contiguous() for each in sources]
    merged = given[0].new_empty((*given[0].shape[:2], sent.bytes), dtype=torch.uint8)
    runs, place = ([], [0, 0, 0]) if draws is None else draws.place
    operators.merge_records(
        [each.data_ptr() for each in given],
        FULL_BITS if kept is None else kept.bits,
        None if kept is None else table_of(kept.bits),
        merged,
        sent.bits,
        sent.numbers,
        *_levels(sent, draws),
        divisor,
        runs,
        place,
    )
    return merged


def read(records: Tensor, code: Code) -> Tensor:
    """``Reader``: the numbers that ``read_by_torch`` finds."""
    operators = found().operators
    if operators is None or records.numel() == 0:
        return read_by_torch(records, code, torch.float32)
    given, shape = records.contiguous(), (*records.shape[:-1], code.numbers)
    numbers = floats(given.numel() // code.bytes, 1, code.numbers)
    operators.merge_records(
        [given.data_ptr()],
        code.bits,
        table_of(code.bits),
        numbers,
        FULL_BITS,
        code.numbers,
        None,
        None,
        1.0,
        [],
        [0, 0, 0],
    )
    return numbers.view(shape)


def _rounded(numbers_R: Tensor, code: Code, draws: Draws | None) -> Tensor:
    if draws is None:
        return level_records(numbers_R, code)
    bits = draws.bits(numbers_R.device)
    return round_records(numbers_R, bits.view(numbers_R.shape), code)


def _numbers(source: Tensor, kept: Code | None, dtype: torch.dtype) -> Tensor:
    return source if kept is None else read_records(source, kept, dtype)


def table_of(bits: int) -> Tensor | None:
    """What the kernels look values up in; there is none at 16 bits."""
    return None if bits == 16 else value_table(bits, torch.float32, torch.device("cpu"))


def _levels(code: Code, draws: Draws | None) -> tuple[Tensor | None, Tensor | None]:
    if draws is not None:
        return None, None
    return level_tables(code.bits, torch.float32, torch.device("cpu"))
