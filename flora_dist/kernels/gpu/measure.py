# SPDX-License-Identifier: Apache-2.0
"""Message 1 of matrices: new row means, and sums over the rows of a tile by column.

Sums by column are weighted by 1 / R, which is known after a whole row. ``measure_rows`` keeps
whole rows in registers and reads them once. ``measure`` looks twice: where rows are too long for
that, and where more than the gradient is read. What a program sums is kept by tile and added up in
the order of tiles, so that bits do not depend on which one comes first. core/step/matrix.py has the
formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flora_dist.kernels.gpu.access import (
    BETA2,
    BY_COLUMNS,
    ENTRY,
    EPS,
    FRESH,
    SIGN,
    STRIP_MATRIX,
    STRIP_MOMENTUM,
    STRIP_NUMBERS,
    STRIP_ROW,
    STRIP_ROWS,
    STRIP_SCRATCH,
    STRIP_STRIDE,
    STRIP_TILE,
    STRIP_WEIGHT,
    gradient_of,
    loaded,
    pointer,
    product,
    row_scale,
    sketch_of,
)
from flora_dist.kernels.gpu.codes import decoded, record_of
from flora_dist.kernels.gpu.expand import block_of, drawn_of


@triton.jit
def measure_rows(
    strips,
    given,
    numbers,
    rows_out,
    partials,
    num_columns,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMALISE: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Row means, and partial sums by column of one tile; STEP rows of up to WIDTH at a time."""
    strip = strips + tl.program_id(1) * STRIP_NUMBERS
    count = tl.load(strip + STRIP_ROWS).to(tl.int32)
    first = tl.program_id(0) * ROWS
    if first < count:
        columns = tl.arange(0, WIDTH)
        is_column = columns < num_columns
        tile_start = first.to(tl.int64) * num_columns
        gradient = gradient_of(strip, given, GRADIENT, ALIGNED) + tile_start
        down = tl.arange(0, STEP)[:, None] * num_columns + columns[None, :]
        plain = tl.zeros((WIDTH,), tl.float32)
        weighted = tl.zeros((WIDTH,), tl.float32)
        for start in range(first, min(first + ROWS, count), STEP):
            rows = start + tl.arange(0, STEP)
            is_row = rows < count
            inside = is_row[:, None] & is_column[None, :]
            g = loaded(gradient + ((start - first) * num_columns + down), inside)
            square = g * g
            row = _new_row(strip, numbers, rows_out, rows, is_row, tl.sum(square, 1) / num_columns)
            plain += tl.sum(square, 0)
            if SUMS > 1:
                weighted += tl.sum(square * _weights(row, is_row, NORMALISE)[:, None], 0)
        tile = tl.load(strip + STRIP_TILE) + tl.program_id(0)
        out = partials + tile * SUMS * num_columns + columns
        tl.store(out, plain, mask=is_column)
        if SUMS > 1:
            tl.store(out + num_columns, weighted, mask=is_column)


@triton.jit
def _new_row(strip, numbers, rows_out, rows, is_row, mean):
    """R <- b2 R + (1-b2) (rowmean(G^2) + eps), kept apart until the step is finished."""
    state = pointer(tl.load(strip + STRIP_ROW), tl.float32, False)
    before = tl.load(state + rows, mask=is_row, other=0.0)
    mean += tl.load(numbers + EPS)
    row = tl.load(numbers + BETA2) * before + tl.load(numbers + FRESH) * mean
    tl.store(rows_out + tl.load(strip + STRIP_SCRATCH) + rows, row, mask=is_row)
    return row


@triton.jit
def _weights(row, is_row, NORMALISE: tl.constexpr):
    """What squares are multiplied by, the square of what rows are; 0 outside of the matrix."""
    if NORMALISE == BY_COLUMNS:
        weight = tl.where(is_row, 1.0, 0.0)
    else:
        weight = tl.where(is_row, 1.0 / row, 0.0)
    return weight


@triton.jit
def measure(
    strips,
    given,
    numbers,
    old,
    drawn,
    table,
    multipliers,
    values,
    rows_out,
    partials,
    singles,
    num_columns,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    HISTORY: tl.constexpr,
    SCALED: tl.constexpr,
    BITS: tl.constexpr,
    DRAWN: tl.constexpr,
    DRAWN_PADDED: tl.constexpr,
    KEPT: tl.constexpr,
    NORMALISE: tl.constexpr,
    GRADIENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Row means, partial sums by column and single sums of one tile.

    ``rows_out``: the new R of all strips. ``partials``: (tiles, SUMS, M), of G^2, G^2 / R and
    G (M A) / sqrt(R). ``singles``: (tiles, 2), |M A|^2 and |W|^2. BITS: of a gradient's sketches,
    in ``drawn``; 0: it is dense. KEPT: of a momentum in few bits, else 0.
    """
    strip = strips + tl.program_id(1) * STRIP_NUMBERS
    count = tl.load(strip + STRIP_ROWS).to(tl.int32)
    first = tl.program_id(0) * ROWS
    if first < count:
        tile = tl.load(strip + STRIP_TILE) + tl.program_id(0)
        rows = first + tl.arange(0, ROWS)
        is_row = rows < count
        places = (first.to(tl.int64) * num_columns) + (
            tl.arange(0, ROWS)[:, None] * num_columns + tl.arange(0, WIDTH)[None, :]
        )
        gradient = gradient_of(strip, given, GRADIENT, ALIGNED)
        gradient_a = drawn_of(strip, drawn, BITS, DRAWN, DRAWN_PADDED, WIDTH)
        blocks = tl.cdiv(num_columns, WIDTH)
        source = (strip, given, multipliers, numbers, table, gradient_a, rows, num_columns, blocks)
        keeping = (strip, numbers, old, rows, is_row, values)
        sums = tl.zeros((ROWS,), tl.float32)
        for start in range(0, num_columns, WIDTH):
            inside = is_row[:, None] & (start + tl.arange(0, WIDTH) < num_columns)[None, :]
            here, block = gradient + start + places, start // WIDTH
            g = block_of(source, here, inside, block, BITS, DRAWN, DRAWN_PADDED)
            sums += tl.sum(g * g, 1)
        row = _new_row(strip, numbers, rows_out, rows, is_row, sums / num_columns)
        inverse = _weights(row, is_row, NORMALISE)
        history = tl.zeros((ROWS,), tl.float32)
        size = tl.zeros((ROWS,), tl.float32)
        for start in range(0, num_columns, WIDTH):
            columns = start + tl.arange(0, WIDTH)
            is_column = columns < num_columns
            inside = is_row[:, None] & is_column[None, :]
            here, block = gradient + start + places, start // WIDTH
            g = block_of(source, here, inside, block, BITS, DRAWN, DRAWN_PADDED)
            square = g * g
            out = partials + tile * SUMS * num_columns + columns
            tl.store(out, tl.sum(square, 0), mask=is_column)
            if SUMS > 1:
                weighted = tl.sum(square * inverse[:, None], 0)
                tl.store(out + num_columns, weighted, mask=is_column)
            if HISTORY:
                in_block = (columns, inside, block)
                past = past_of(keeping, in_block, WIDTH, RANK, PADDED, KEPT, MOMENTUM, ALIGNED)
                history += tl.sum(past * past, 1)
                root = tl.where(is_row, row_scale(row, NORMALISE), 0.0) * tl.load(numbers + SIGN)
                cross = tl.sum(g * past * root[:, None], 0)
                tl.store(out + 2 * num_columns, cross, mask=is_column)
            if SCALED:
                weight = pointer(tl.load(strip + STRIP_WEIGHT), WEIGHT, ALIGNED)
                w = loaded(weight + start + places, inside)
                size += tl.sum(w * w, 1)
        if HISTORY:
            tl.store(singles + 2 * tile, tl.sum(history, 0))
        if SCALED:
            tl.store(singles + 2 * tile + 1, tl.sum(size, 0))


@triton.jit
def past_of(
    keeping,
    here,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    KEPT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """M A_old of one block (rows, WIDTH), zero outside of the matrix.

    ``keeping``: strip, numbers, A_old, rows, which are rows, values of codes. ``here``: columns
    and the block, of those that are here, and between them which elements are.
    """
    columns, inside, block = here
    strip, numbers, old, rows, is_row, values = keeping
    momentum = pointer(tl.load(strip + STRIP_MOMENTUM), MOMENTUM, ALIGNED)
    down = rows[:, None].to(tl.int64) * tl.load(strip + STRIP_STRIDE)
    if RANK == 0:
        past = loaded(momentum + down + columns[None, :], inside)
    else:
        if KEPT == 0:
            ranks = tl.arange(0, PADDED)
            kept = block * RANK + ranks
            m = loaded(momentum + down + kept[None, :], is_row[:, None] & (ranks < RANK)[None, :])
        else:
            at = record_of(strip, rows, block, KEPT, RANK)
            m = decoded(at, is_row, values, KEPT, RANK, PADDED)
        a = sketch_of(old, tl.load(strip + STRIP_MATRIX), RANK, PADDED, WIDTH)
        past = tl.where(inside, product(m, a) * tl.load(numbers + ENTRY), 0.0)
    return past
