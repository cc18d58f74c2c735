# SPDX-License-Identifier: Apache-2.0
"""Sums over tiles, and what follows from the sums over ranks: C, the norms, and the clip."""

from __future__ import annotations

import triton
import triton.language as tl

from flora_dist.kernels.gpu.access import (
    BETA1,
    BETA2,
    BLEND,
    CLIP,
    EPS,
    FLORA,
    FRESH,
    LR,
    NONE,
    pointer,
)

MATRIX_FIRST = tl.constexpr(0)
MATRIX_LAST = tl.constexpr(1)
MATRIX_COLUMN = tl.constexpr(2)
MATRIX_SUMMED = tl.constexpr(3)
MATRIX_ROW = tl.constexpr(4)
MATRIX_ROWS = tl.constexpr(5)
MATRIX_NUMBERS = tl.constexpr(6)
_SMALLEST_SCALE = tl.constexpr(1e-3)
"""``SMALLEST_SCALE`` of core/step/elements.py."""


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
    SUMS: tl.constexpr,
    HISTORY: tl.constexpr,
    SCALED: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The terms of one matrix, of some columns: its tiles' sums, in the order of the tiles."""
    matrix = matrices + tl.program_id(1) * MATRIX_NUMBERS
    first, last = tl.load(matrix + MATRIX_FIRST), tl.load(matrix + MATRIX_LAST)
    place = tl.load(matrix + MATRIX_SUMMED)
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    is_column = columns < num_columns
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
def gather_update(matrices, singles, update_out, groups, WIDTH: tl.constexpr):
    """|U|^2 of one matrix, from those of its rows (rows, groups)."""
    matrix = matrices + tl.program_id(0) * MATRIX_NUMBERS
    first = tl.load(matrix + MATRIX_ROW) * groups
    last = first + tl.load(matrix + MATRIX_ROWS) * groups
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(first, last, WIDTH):
        places = start + tl.arange(0, WIDTH)
        total += tl.load(singles + places, mask=places < last, other=0.0)
    tl.store(update_out + tl.load(matrix + MATRIX_SUMMED), tl.sum(total, 0))


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
    WIDTH: tl.constexpr,
):
    """New C, sqrt(mean(R) / C), and the sums |X|^2 and <X, M A> of one matrix."""
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
        mean = tl.load(columns_in + given + columns, mask=inside, other=0.0) / num_rows + eps
        c = beta2 * tl.load(state + columns, mask=inside, other=0.0) + fresh * mean
        tl.store(column_out + made + columns, c, mask=inside)
        total += tl.where(inside, c, 0.0)
    # mean(R) = mean(C). Roots first: their quotient would overflow for a large gradient beside an
    # empty column.
    root = tl.sqrt(tl.sum(total, 0) / num_columns)
    x2 = tl.zeros((WIDTH,), tl.float32)
    cross = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, num_columns, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        inside = columns < num_columns
        factor = root * tl.rsqrt(tl.load(column_out + made + columns, mask=inside, other=1.0))
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
    CLIPS: tl.constexpr,
    KNOWN: tl.constexpr,
    SCALED: tl.constexpr,
    NUMBERS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of some matrices: the factor of X, and the step size.

    ``matrices``: a table of NUMBERS each. ``scales_out``: (matrices, 2). KNOWN: |U|^2 stands in
    ``update``, by summed matrix; otherwise it follows from ``sums`` and ``history``.
    """
    here = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = here < count
    place = tl.load(matrices + here * NUMBERS + MATRIX_SUMMED, mask=inside, other=0)
    clip = tl.full((WIDTH,), 1.0, tl.float32)
    if CLIPS:
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
        rms = tl.sqrt(tl.maximum(square, 0.0) / elements)
        clip = 1.0 / tl.maximum(rms / tl.load(numbers + CLIP), 1.0)
    rate = tl.load(numbers + LR) + tl.zeros((WIDTH,), tl.float32)
    if SCALED:
        size = tl.sqrt(tl.load(weight + place, mask=inside, other=0.0) / elements)
        rate = rate * tl.maximum(size, _SMALLEST_SCALE)
    x_factor = clip
    if RULE != NONE and RULE != BLEND:
        x_factor = tl.full((WIDTH,), 1.0, tl.float32)
        rate = rate * clip
    tl.store(scales_out + 2 * here, x_factor, mask=inside)
    tl.store(scales_out + 2 * here + 1, rate, mask=inside)
