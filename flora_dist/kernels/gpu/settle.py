# SPDX-License-Identifier: Apache-2.0
"""Sums over tiles, and what follows from the sums over ranks: C, the norms, and the clip."""

from __future__ import annotations

import triton
import triton.language as tl

from flora_dist.core.step.elements import LEAST_NORM, MOST_GROWN, SMALLEST_SCALE
from flora_dist.kernels.gpu.access import (
    BETA1,
    BETA2,
    BY_COLUMNS,
    BY_ROWS,
    BY_SIZE,
    CLIP,
    CLIPPED,
    EPS,
    FLORA,
    FRESH,
    GROWTH,
    LR,
    UNBOUNDED,
    UNSCALED,
    pointer,
)

MATRIX_FIRST = tl.constexpr(0)
MATRIX_LAST = tl.constexpr(1)
MATRIX_COLUMN = tl.constexpr(2)
MATRIX_SUMMED = tl.constexpr(3)
MATRIX_ROW = tl.constexpr(4)
MATRIX_ROWS = tl.constexpr(5)
MATRIX_NORM = tl.constexpr(6)
MATRIX_START = tl.constexpr(7)
MATRIX_NUMBERS = tl.constexpr(8)
# As core/step/elements.py has them.
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_LEAST_NORM = tl.constexpr(LEAST_NORM)
_MOST_GROWN = tl.constexpr(MOST_GROWN)


@triton.jit
def gather(
    matrices,
    partials,
    singles,
    columns_out,
    squares_out,
    cross_out,
    history_out,
    weight_out,
    num_columns,
    first_column,
    width,
    SUMS: tl.constexpr,
    HISTORY: tl.constexpr,
    SCALED: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The terms of one matrix, of some columns: its tiles' sums, in the order of the tiles.

    The rank has ``width`` columns from ``first_column`` on.
    """
    matrix = matrices + tl.program_id(1) * MATRIX_NUMBERS
    first, last = tl.load(matrix + MATRIX_FIRST), tl.load(matrix + MATRIX_LAST)
    place = tl.load(matrix + MATRIX_SUMMED)
    columns = first_column + tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    is_column = columns < first_column + width
    out = place * num_columns + columns
    for which in tl.static_range(SUMS):
        total = tl.zeros((WIDTH,), tl.float32)
        for start in range(first, last, TILES):
            tiles = start + tl.arange(0, TILES)
            inside = (tiles < last)[:, None] & is_column[None, :]
            places = (tiles[:, None] * SUMS + which) * num_columns + columns[None, :]
            total += tl.sum(tl.load(partials + places, mask=inside, other=0.0), 0)
        if which == 0:
            tl.store(columns_out + out, total, mask=is_column)
        elif which == 1:
            tl.store(squares_out + out, total, mask=is_column)
        else:
            tl.store(cross_out + out, total, mask=is_column)
    if tl.program_id(0) == 0:
        if HISTORY:
            tl.store(history_out + place, _single(singles, first, last, TILES))
        if SCALED:
            tl.store(weight_out + place, _single(singles + 1, first, last, TILES))


@triton.jit
def _single(singles, first, last, TILES: tl.constexpr):
    """The sum of one number over tiles."""
    total = tl.zeros((TILES,), tl.float32)
    for start in range(first, last, TILES):
        tiles = start + tl.arange(0, TILES)
        total += tl.load(singles + 2 * tiles, mask=tiles < last, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def gather_rows(matrices, singles, sums_out, groups, WIDTH: tl.constexpr):
    """The sum over one matrix, |U|^2 or another, from those of its rows (rows, groups)."""
    matrix = matrices + tl.program_id(0) * MATRIX_NUMBERS
    first = tl.load(matrix + MATRIX_ROW) * groups
    last = first + tl.load(matrix + MATRIX_ROWS) * groups
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(first, last, WIDTH):
        places = start + tl.arange(0, WIDTH)
        total += tl.load(singles + places, mask=places < last, other=0.0)
    tl.store(sums_out + tl.load(matrix + MATRIX_SUMMED), tl.sum(total, 0))


@triton.jit
def settle(
    matrices,
    numbers,
    columns_in,
    squares_in,
    cross_in,
    column_out,
    factor_out,
    sums_out,
    num_rows,
    num_columns,
    SUMS: tl.constexpr,
    NORMALISE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """New C, what columns are multiplied by, and the sums |X|^2 and <X, M A> of one matrix."""
    here = tl.program_id(0)
    matrix = matrices + here * MATRIX_NUMBERS
    state = pointer(tl.load(matrix + MATRIX_COLUMN), tl.float32, False)
    given = tl.load(matrix + MATRIX_SUMMED) * num_columns
    made = here.to(tl.int64) * num_columns
    beta2, fresh, eps = tl.load(numbers + BETA2), tl.load(numbers + FRESH), tl.load(numbers + EPS)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, num_columns, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        inside = columns < num_columns
        # C <- b2 C + (1-b2) colmean(G^2 + eps)
        fresh_sum = tl.load(columns_in + given + columns, mask=inside, other=0.0)
        mean = tl.div_rn(fresh_sum, tl.zeros_like(fresh_sum) + num_rows) + eps
        c = beta2 * tl.load(state + columns, mask=inside, other=0.0) + fresh * mean
        tl.store(column_out + made + columns, c, mask=inside)
        total += tl.where(inside, c, 0.0)
    # mean(R) = mean(C). Roots first: their quotient would overflow for a large gradient beside an
    # empty column.
    root = tl.sqrt(tl.sum(total, 0) / num_columns)
    if NORMALISE == BY_COLUMNS:
        root = 1.0
    x2 = tl.zeros((WIDTH,), tl.float32)
    cross = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, num_columns, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        inside = columns < num_columns
        if NORMALISE % 2 == BY_ROWS:  # or raw
            factor = tl.full((WIDTH,), 1.0, tl.float32)
        else:
            c = tl.load(column_out + made + columns, mask=inside, other=1.0)
            factor = root * tl.rsqrt(c)
        tl.store(factor_out + made + columns, factor, mask=inside)
        # |X|^2 = mean(R) sum_j S1_j / C_j;  <X, M A> = sqrt(mean(R)) sum_j S2_j / sqrt(C_j)
        if SUMS > 1:
            square = tl.load(squares_in + given + columns, mask=inside, other=0.0)
            x2 += square * factor * factor
        if SUMS > 2:
            cross += tl.load(cross_in + given + columns, mask=inside, other=0.0) * factor
    tl.store(sums_out + 2 * here, tl.sum(x2, 0))
    tl.store(sums_out + 2 * here + 1, tl.sum(cross, 0))


@triton.jit
def scale(
    matrices,
    numbers,
    sums,
    history,
    update,
    weight,
    scales_out,
    count,
    elements,
    RULE: tl.constexpr,
    CLIPS_INPUT: tl.constexpr,
    BOUND: tl.constexpr,
    KNOWN: tl.constexpr,
    SCALED: tl.constexpr,
    NUMBERS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of some matrices: the factor of X, and the step size.

    ``matrices``: a table of NUMBERS each. ``scales_out``: (matrices, 2). BOUND: by clip, or by
    growth, which keeps a norm of each. SCALED: the step size by RMS(weight), or by what that has
    grown by since the first step. KNOWN: |U|^2 stands in ``update``, by summed matrix;
    otherwise it follows from ``sums`` and ``history``.
    """
    here = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = here < count
    place = tl.load(matrices + here * NUMBERS + MATRIX_SUMMED, mask=inside, other=0)
    clip = tl.full((WIDTH,), 1.0, tl.float32)
    if BOUND != UNBOUNDED:
        if KNOWN:
            square = tl.load(update + place, mask=inside, other=0.0)
        else:
            square = tl.load(sums + 2 * here, mask=inside, other=0.0)
            if RULE == FLORA:
                # |(1-b) X + b M A|^2, term by term
                b = tl.load(numbers + BETA1)
                cross = tl.load(sums + 2 * here + 1, mask=inside, other=0.0)
                past = tl.load(history + place, mask=inside, other=0.0)
                square = (1 - b) * (1 - b) * square + 2 * b * (1 - b) * cross + b * b * past
        # Sums over shards can round a true zero to just below it.
        square = tl.where(square < 0.0, 0.0, square)
        if BOUND == CLIPPED:
            rms = tl.sqrt(square / elements)
            clip = 1.0 / tl.maximum(rms / tl.load(numbers + CLIP), 1.0)
        else:
            address = tl.load(matrices + here * NUMBERS + MATRIX_NORM, mask=inside, other=0)
            kept = pointer(address, tl.float32, False)
            clip = _limited(kept, tl.sqrt(square), tl.load(numbers + GROWTH), inside)
    rate = tl.load(numbers + LR) + tl.zeros((WIDTH,), tl.float32)
    if SCALED != UNSCALED:
        size = tl.sqrt(tl.load(weight + place, mask=inside, other=0.0) / elements)
        size = tl.maximum(size, _SMALLEST_SCALE)
        if SCALED == BY_SIZE:
            rate = rate * size
        else:
            address = tl.load(matrices + here * NUMBERS + MATRIX_START, mask=inside, other=0)
            rate = rate * _grown(pointer(address, tl.float32, False), size, inside)
    x_factor = clip
    if not CLIPS_INPUT:  # U is what is clipped
        x_factor = tl.full((WIDTH,), 1.0, tl.float32)
        rate = rate * clip
    tl.store(scales_out + 2 * here, x_factor, mask=inside)
    tl.store(scales_out + 2 * here + 1, rate, mask=inside)


@triton.jit
def _limited(kept, norm, growth, inside):
    """min(1, growth last / norm), and the norm that this leaves in place of the last one.

    0 / 0 and inf / inf limit nothing, and NaN stays in the norm.
    """
    last = tl.load(kept, mask=inside, other=0.0)
    bound = tl.where(last > _LEAST_NORM, growth * last, norm)
    factor = bound / norm
    tl.store(kept, tl.where(bound < norm, bound, norm), mask=inside)
    return tl.where(factor < 1.0, factor, 1.0)


@triton.jit
def _grown(kept, size, inside):
    """``size`` over what it was at the first step, which is written then; 1 if that was tiny."""
    start = tl.load(kept, mask=inside, other=1.0)
    start = tl.where(start > 0.0, start, size)
    tl.store(kept, start, mask=inside)
    grown = tl.minimum(tl.maximum(size / start, 1.0 / _MOST_GROWN), _MOST_GROWN)
    return tl.where(start > _SMALLEST_SCALE, grown, 1.0)
