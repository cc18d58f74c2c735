# SPDX-License-Identifier: Apache-2.0
"""Rows that several ranks hold pieces of: what is summed of them before they can be stepped.

Their R is known after message 1, so that their share of the norms comes later than that of whole
rows: from whole rows that travel where these are few, or by message 2. Sums that follow each other
are made by ``settle.py``; ``finish.py`` steps cut rows as it steps whole ones. core/step/matrix.py
has the formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flora_dist.kernels.gpu.access import (
    BETA2,
    ENTRY,
    EPS,
    FRESH,
    SIGN,
    STRIP_MATRIX,
    STRIP_NUMBERS,
    STRIP_ROW,
    STRIP_ROWS,
    STRIP_SCRATCH,
    STRIP_SLOT,
    STRIP_TILE,
    STRIP_WEIGHT,
    gradient_of,
    loaded,
    pointer,
    product,
    row_scale,
    sketch_of,
    slot_of,
    stretch_of,
)
from flora_dist.kernels.gpu.expand import block_of, drawn_of
from flora_dist.kernels.gpu.measure import past_of


@triton.jit
def measure_cut(
    strips,
    given,
    numbers,
    old,
    drawn,
    table,
    multipliers,
    values,
    rows_out,
    elements,
    products,
    partials,
    singles,
    num_columns,
    SUMS: tl.constexpr,
    TRAVELS: tl.constexpr,
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
    GRADIENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """What message 1 needs of a tile of cut rows.

    Partial sums of G^2 by column, the first of SUMS, and ``singles`` as ``measure`` makes them.
    TRAVELS: G goes to ``elements`` (rows that travel, M), G (M A) to ``products``; otherwise sums
    of G^2 go to ``rows_out`` (cut rows,).
    """
    strip = strips + tl.program_id(1) * STRIP_NUMBERS
    count = tl.load(strip + STRIP_ROWS).to(tl.int32)
    first = tl.program_id(0) * ROWS
    if first < count:
        tile = tl.load(strip + STRIP_TILE) + tl.program_id(0)
        rows = first + tl.arange(0, ROWS)
        is_row = rows < count
        slots = tl.load(strip + STRIP_SLOT) + rows
        left, width, touched, blocks = stretch_of(strip, WIDTH, ALIGNED)
        down = tl.arange(0, ROWS)[:, None] * width + tl.arange(0, WIDTH)[None, :]
        before = first.to(tl.int64) * width + (touched * WIDTH - left)
        gradient = gradient_of(strip, given, GRADIENT, ALIGNED)
        gradient_a = drawn_of(strip, drawn, BITS, DRAWN, DRAWN_PADDED, WIDTH)
        source = (strip, given, multipliers, numbers, table, gradient_a, rows, width, blocks)
        keeping = (strip, numbers, old, rows, is_row, values)
        sums = tl.zeros((ROWS,), tl.float32)
        history = tl.zeros((ROWS,), tl.float32)
        size = tl.zeros((ROWS,), tl.float32)
        for block in range(0, blocks):
            columns = (touched + block) * WIDTH + tl.arange(0, WIDTH)
            is_column = (columns >= left) & (columns < left + width)
            inside = is_row[:, None] & is_column[None, :]
            here = before + (block * WIDTH + down)
            g = block_of(source, gradient + here, inside, block, BITS, DRAWN, DRAWN_PADDED)
            square = g * g
            sums += tl.sum(square, 1)
            out = partials + tile * SUMS * num_columns + columns
            tl.store(out, tl.sum(square, 0), mask=is_column)
            g *= tl.load(numbers + SIGN)
            places = slots[:, None] * num_columns + columns[None, :]
            if TRAVELS:
                tl.store(elements + places, g, mask=inside)
            if HISTORY:
                in_block = (columns - left, inside, block)
                past = past_of(keeping, in_block, WIDTH, RANK, PADDED, KEPT, MOMENTUM, ALIGNED)
                history += tl.sum(past * past, 1)
                if TRAVELS:
                    tl.store(products + places, g * past, mask=inside)
            if SCALED:
                weight = pointer(tl.load(strip + STRIP_WEIGHT), WEIGHT, ALIGNED)
                w = loaded(weight + here, inside)
                size += tl.sum(w * w, 1)
        if not TRAVELS:
            tl.store(rows_out + slots, sums, mask=is_row)
        if HISTORY:
            tl.store(singles + 2 * tile, tl.sum(history, 0))
        if SCALED:
            tl.store(singles + 2 * tile + 1, tl.sum(size, 0))


@triton.jit
def settle_cut(strips, numbers, sums, rows_out, num_columns, ROWS: tl.constexpr):
    """The new R of cut rows, from their ``sums`` of G^2 over all ranks.

    Launched without fusion: R has the bits that torch's operators give it, since ranks that share a
    row may run either.
    """
    strip = strips + tl.program_id(1) * STRIP_NUMBERS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < tl.load(strip + STRIP_ROWS)
    state = pointer(tl.load(strip + STRIP_ROW), tl.float32, False)
    before = tl.load(state + rows, mask=is_row, other=0.0)
    total = tl.load(sums + tl.load(strip + STRIP_SLOT) + rows, mask=is_row, other=0.0)
    # R <- b2 R + (1-b2) rowmean(G^2 + eps)
    mean = tl.div_rn(total, tl.zeros_like(total) + num_columns) + tl.load(numbers + EPS)
    row = tl.load(numbers + BETA2) * before + tl.load(numbers + FRESH) * mean
    tl.store(rows_out + tl.load(strip + STRIP_SCRATCH) + rows, row, mask=is_row)


@triton.jit
def couple_cut(
    strips,
    given,
    numbers,
    old,
    drawn,
    table,
    multipliers,
    values,
    new,
    rows_in,
    factors,
    squares,
    cross,
    blocks_out,
    num_columns,
    SUMS: tl.constexpr,
    SKETCHES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    NORMALISE: tl.constexpr,
    BITS: tl.constexpr,
    DRAWN: tl.constexpr,
    DRAWN_PADDED: tl.constexpr,
    KEPT: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """What message 2 needs of some cut rows and blocks.

    ``squares`` and ``cross``: (rows, groups of blocks), |X|^2 and <X, M A>, as many as SUMS asks
    for beside one. SKETCHES: partial sketches of cut blocks go to ``blocks_out``.
    """
    strip = strips + tl.program_id(2) * STRIP_NUMBERS
    count = tl.load(strip + STRIP_ROWS).to(tl.int32)
    first = tl.program_id(0) * ROWS
    if first < count:
        matrix = tl.load(strip + STRIP_MATRIX)
        rows = first + tl.arange(0, ROWS)
        is_row = rows < count
        kept_rows = tl.load(strip + STRIP_SCRATCH) + rows
        row = tl.load(rows_in + kept_rows, mask=is_row, other=1.0)
        x_scale = tl.load(numbers + SIGN) * row_scale(row, NORMALISE)
        left, width, touched, blocks = stretch_of(strip, WIDTH, ALIGNED)
        down = tl.arange(0, ROWS)[:, None] * width + tl.arange(0, WIDTH)[None, :]
        before = first.to(tl.int64) * width + (touched * WIDTH - left)
        gradient = gradient_of(strip, given, GRADIENT, ALIGNED)
        gradient_a = drawn_of(strip, drawn, BITS, DRAWN, DRAWN_PADDED, WIDTH)
        source = (strip, given, multipliers, numbers, table, gradient_a, rows, width, blocks)
        keeping = (strip, numbers, old, rows, is_row, values)
        square = tl.zeros((ROWS,), tl.float32)
        along = tl.zeros((ROWS,), tl.float32)
        start = tl.program_id(1) * GROUP
        for block in range(start, min(start + GROUP, blocks)):
            columns = (touched + block) * WIDTH + tl.arange(0, WIDTH)
            is_column = (columns >= left) & (columns < left + width)
            inside = is_row[:, None] & is_column[None, :]
            here = before + (block * WIDTH + down)
            g = block_of(source, gradient + here, inside, block, BITS, DRAWN, DRAWN_PADDED)
            place = matrix * num_columns + columns
            factor = tl.load(factors + place, mask=is_column, other=0.0)
            x = g * x_scale[:, None] * factor[None, :]
            square += tl.sum(x * x, 1)
            if SUMS > 2:
                in_block = (columns - left, inside, block)
                past = past_of(keeping, in_block, WIDTH, RANK, PADDED, KEPT, MOMENTUM, ALIGNED)
                along += tl.sum(x * past, 1)
            if SKETCHES:
                slot = slot_of(strip, block, blocks)
                if slot >= 0:
                    a = sketch_of(new, matrix, RANK, PADDED, WIDTH)
                    c = tl.load(numbers + ENTRY) * product(x, tl.trans(a))
                    ranks = tl.arange(0, PADDED)
                    out = blocks_out + (slot + rows)[:, None] * RANK + ranks[None, :]
                    tl.store(out, c, mask=is_row[:, None] & (ranks < RANK)[None, :])
        out = kept_rows * tl.num_programs(1) + tl.program_id(1)
        if SUMS > 1:
            tl.store(squares + out, square, mask=is_row)
        if SUMS > 2:
            tl.store(cross + out, along, mask=is_row)
