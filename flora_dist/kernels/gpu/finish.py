# SPDX-License-Identifier: Apache-2.0
"""From the normalisation to new weights and momentum: the second look at the gradients.

A program takes some rows and a few blocks of one matrix. core/step/momentum_rules.py has the
formulas, core/step/elements.py the rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flora_dist.kernels.gpu.access import (
    ADEMAMIX,
    APOLLO,
    ENTRY,
    FLORA,
    GAIN,
    KEEP,
    MOVES,
    NONE,
    SIGN,
    STAYS,
    STRIP_LINE,
    STRIP_MATRIX,
    STRIP_MEMBER,
    STRIP_MOMENTUM,
    STRIP_NUMBERS,
    STRIP_ROW,
    STRIP_ROWS,
    STRIP_SCRATCH,
    STRIP_STRIDE,
    STRIP_WEIGHT,
    SUBSPACE_ADAM,
    gradient_of,
    loaded,
    pointer,
    product,
    row_scale,
    sketch_of,
    slot_of,
    stretch_of,
)
from flora_dist.kernels.gpu.codes import decoded, record_of, rounded_codes, stored
from flora_dist.kernels.gpu.expand import block_of, drawn_of
from flora_dist.kernels.gpu.rounding import bits_at, bits_of_rows, rounded
from flora_dist.kernels.gpu.rules import (
    advanced,
    advanced_moments,
    in_subspace,
    scaled_blocks,
    sketched,
)

FINISH_WRITES = 0
FINISH_TALLIES = 1
"""What a pass is for: new weights and state, or the norms of the updates alone."""


@triton.jit
def finish(
    strips,
    given,
    numbers,
    old,
    drawn,
    table,
    multipliers,
    values,
    keys,
    new,
    move,
    rows_in,
    factors,
    cut_blocks,
    scales,
    singles,
    members,
    num_columns,
    num_blocks,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    TALLIES: tl.constexpr,
    ROUNDS: tl.constexpr,
    CUT: tl.constexpr,
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
    """Step some rows and blocks; TALLIES: write nothing but |U|^2 of them, into ``singles``.

    ``old``, ``new``: A (matrices, RANK, WIDTH) before and after the step. ``move``: (matrices,
    RANK, RANK), s A_old A_new^T. ``scales``: (matrices, 2), of X and of the step. ``singles``:
    (rows, groups of blocks). ``members``: how many, for the places of the ``keys``. CUT: rows are,
    and ``cut_blocks`` has whole sketches of cut blocks. BITS: of a gradient's sketches, in
    ``drawn``; 0: it is dense. KEPT: of a momentum in few bits, else 0.
    """
    has_second: tl.constexpr = RULE >= SUBSPACE_ADAM
    kept_of_block: tl.constexpr = 2 * RANK if has_second else RANK
    strip = strips + tl.program_id(2) * STRIP_NUMBERS
    count = tl.load(strip + STRIP_ROWS).to(tl.int32)
    first = tl.program_id(0) * ROWS
    if first < count:
        matrix = tl.load(strip + STRIP_MATRIX)
        rows = first + tl.arange(0, ROWS)
        is_row = rows < count
        row = tl.load(rows_in + tl.load(strip + STRIP_SCRATCH) + rows, mask=is_row, other=1.0)
        x_scale = tl.load(scales + 2 * matrix) * tl.load(numbers + SIGN)
        x_scale = x_scale * row_scale(row, NORMALISE)
        rate, keep = tl.load(scales + 2 * matrix + 1), tl.load(numbers + KEEP)
        gradient = gradient_of(strip, given, GRADIENT, ALIGNED)
        weight = pointer(tl.load(strip + STRIP_WEIGHT), WEIGHT, ALIGNED)
        lines = tl.load(strip + STRIP_LINE) + rows
        keys += tl.load(strip + STRIP_MEMBER)
        # Of a row that is here: its columns, and the blocks that they touch, the first of a row's.
        left, width, touched, blocks = 0, num_columns, 0, num_blocks
        if CUT:
            left, width, touched, blocks = stretch_of(strip, WIDTH, ALIGNED)
        down = tl.arange(0, ROWS)[:, None] * width + tl.arange(0, WIDTH)[None, :]
        before = first.to(tl.int64) * width + (touched * WIDTH - left)
        new_a, old_a, step = _matrices(old, new, move, matrix, RULE, RANK, PADDED, WIDTH, WINDOW)
        gradient_a = drawn_of(strip, drawn, BITS, DRAWN, DRAWN_PADDED, WIDTH)
        source = (strip, given, multipliers, numbers, table, gradient_a, rows, width, blocks)
        size = tl.zeros((ROWS,), tl.float32)
        start = tl.program_id(1) * GROUP
        for block in range(start, min(start + GROUP, blocks)):
            columns = (touched + block) * WIDTH + tl.arange(0, WIDTH)
            is_column = columns < num_columns
            if CUT:
                is_column = (columns >= left) & (columns < left + width)
            inside = is_row[:, None] & is_column[None, :]
            places = before + (block * WIDTH + down)
            # X = G / sqrt(R C / mean(R)), times the clip where X is what is clipped
            factor = tl.load(factors + matrix * num_columns + columns, mask=is_column, other=0.0)
            g = block_of(source, gradient + places, inside, block, BITS, DRAWN, DRAWN_PADDED)
            u = g * x_scale[:, None] * factor[None, :]
            if RULE != NONE and RANK == 0:
                momentum, inside_m = (
                    _momentum_places(strip, rows, columns - left, MOMENTUM, ALIGNED),
                    inside,
                )
                # A = I: M <- b M + (1-b) X, and U = M, or X + gain M
                made = advanced(numbers, loaded(momentum, inside), u)
                if RULE == ADEMAMIX:
                    u += tl.load(numbers + GAIN) * made
                else:
                    u = made
                kept, per_row = columns, num_columns
            elif RULE != NONE:
                own = block * kept_of_block + tl.arange(0, PADDED)
                kept, per_row = touched * kept_of_block + own, num_blocks * kept_of_block
                inside_m = is_row[:, None] & (tl.arange(0, PADDED) < RANK)[None, :]
                if KEPT == 0:
                    momentum = _momentum_places(strip, rows, own, MOMENTUM, ALIGNED)
                    m = loaded(momentum, inside_m)
                else:
                    momentum = record_of(strip, rows, block, KEPT, RANK)
                    m = decoded(momentum, is_row, values, KEPT, RANK, PADDED)
                c = tl.load(numbers + ENTRY) * product(u, tl.trans(new_a))
                if CUT:
                    x_factor = tl.load(scales + 2 * matrix)
                    slot = slot_of(strip, block, blocks)
                    c = _whole(cut_blocks, slot, c, rows, inside_m, x_factor, RANK, PADDED)
                if has_second:
                    v = loaded(momentum + RANK, inside_m)
                    made, second = advanced_moments(numbers, c, m, v, step, RANK, WINDOW)
                    if RULE == APOLLO:
                        u = scaled_blocks(u, c, made, second, inside_m, RANK, WIDTH)
                    else:
                        u = in_subspace(numbers, u, c, made, second, new_a, RANK, WIDTH)
                else:
                    u, made = sketched(numbers, u, c, m, new_a, old_a, step, RULE, WINDOW)
            if TALLIES:
                size += tl.sum(tl.where(inside, u * u, 0.0), 1)
            else:
                if RULE != NONE and RANK != 0 and KEPT != 0:
                    bits = bits_at(tl.load(keys + members), lines, kept, (per_row + 7) // 8)
                    codes, pattern = rounded_codes(made, bits, KEPT)
                    stored(momentum, is_row, codes, pattern, KEPT, RANK, PADDED)
                elif RULE != NONE:
                    target = (inside_m, lines, keys + members, per_row)
                    _store_momentum(momentum, made, target, kept, MOMENTUM, ROUNDS)
                    if has_second:
                        _store_momentum(
                            momentum + RANK, second, target, kept + RANK, MOMENTUM, ROUNDS
                        )
                # W <- (1 - lr wd) W - rate U
                w = loaded(weight + places, inside) * keep - rate * u
                _store_weight(
                    weight + places,
                    w,
                    inside,
                    lines,
                    (touched + block) * WIDTH,
                    keys,
                    num_columns,
                    WIDTH,
                    WEIGHT,
                    ROUNDS,
                )
        if TALLIES:
            places = (tl.load(strip + STRIP_SCRATCH) + rows) * tl.num_programs(1)
            tl.store(singles + places + tl.program_id(1), size, mask=is_row)
        elif tl.program_id(1) == 0:
            state = pointer(tl.load(strip + STRIP_ROW), tl.float32, False)
            tl.store(state + rows, row, mask=is_row)


@triton.jit
def _matrices(
    old,
    new,
    move,
    matrix,
    RULE: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """A_new, A_old and s A_old A_new^T; what a step does not read is whatever is at hand."""
    if RULE == NONE or RANK == 0:
        new_a = tl.zeros((1, 1), tl.bfloat16)
        old_a, step = new_a, new_a
    else:
        new_a = sketch_of(new, matrix, RANK, PADDED, WIDTH)
        old_a, step = new_a, new_a
        if RULE == FLORA and WINDOW != STAYS:
            old_a = sketch_of(old, matrix, RANK, PADDED, WIDTH)
        if WINDOW == MOVES:
            ranks = tl.arange(0, PADDED)
            is_rank = (ranks < RANK)[:, None] & (ranks < RANK)[None, :]
            places = matrix * (RANK * RANK) + ranks[:, None] * RANK + ranks[None, :]
            step = tl.load(move + places, mask=is_rank, other=0.0)
    return new_a, old_a, step


@triton.jit
def _momentum_places(strip, rows, columns, MOMENTUM: tl.constexpr, ALIGNED: tl.constexpr):
    """Where some numbers of the momentum lie."""
    start = pointer(tl.load(strip + STRIP_MOMENTUM), MOMENTUM, ALIGNED)
    stride = tl.load(strip + STRIP_STRIDE)
    if ALIGNED:
        stride = tl.multiple_of(stride, 4)
    return start + rows[:, None].to(tl.int64) * stride + columns[None, :]


@triton.jit
def _whole(cut_blocks, slot, c, rows, inside, x_factor, RANK: tl.constexpr, PADDED: tl.constexpr):
    """C of a block; of a cut one what all ranks together have of it, times the factor of X."""
    places = (slot + rows)[:, None] * RANK + tl.arange(0, PADDED)[None, :]
    found = loaded(cut_blocks + places, inside & (slot >= 0))
    return tl.where(slot >= 0, found * x_factor, c)


@triton.jit
def _store_weight(
    at,
    value,
    inside,
    lines,
    first,
    key,
    num_columns,
    WIDTH: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Write a block of weights, of ``num_columns`` per row of the whole matrix."""
    if ROUNDS and WEIGHT != tl.float32:
        bits = bits_of_rows(tl.load(key), lines, first, (num_columns + 7) // 8, WIDTH)
        patterns = at.to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(patterns, rounded(value, bits, WEIGHT), mask=inside)
    else:
        tl.store(at, value.to(WEIGHT), mask=inside)


@triton.jit
def _store_momentum(at, value, target, columns, MOMENTUM: tl.constexpr, ROUNDS: tl.constexpr):
    """Write numbers of a momentum; ``columns``: theirs, of a row of the whole matrix.

    ``target``: which are inside, the rows' lines, the key of their bits, numbers of a whole row.
    """
    inside, lines, key, per_row = target
    if ROUNDS and MOMENTUM != tl.float32:
        bits = bits_at(tl.load(key), lines, columns, (per_row + 7) // 8)
        patterns = at.to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(patterns, rounded(value, bits, MOMENTUM), mask=inside)
    else:
        tl.store(at, value.to(MOMENTUM), mask=inside)
