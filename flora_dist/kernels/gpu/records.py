# SPDX-License-Identifier: Apache-2.0
"""C <- Q(C + G A^T): gradients added to their sketches in few bits, block by block in registers.

A program takes some rows and blocks of one matrix: product, what was there, scale, random bits,
rounding and packing, so that no number of a sketch is in memory but in its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flora_dist.kernels.gpu.access import loaded, product
from flora_dist.kernels.gpu.codes import decoded, level_codes, rounded_codes, stored
from flora_dist.kernels.gpu.rounding import bits_at, bits_of_rows


@triton.jit(do_not_specialize=["key_low", "key_high", "first_line", "first_number"])
def add_records(
    x,
    sketches,
    records,
    table,
    levels,
    edges,
    entry,
    key_low,
    key_high,
    first_line,
    first_number,
    num_numbers,
    num_rows,
    num_columns,
    blocks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BEGINS: tl.constexpr,
):
    """Add some rows and blocks of some matrices, which follow each other.

    ``x``: (matrices, rows, columns). ``sketches``: A / ``entry`` (matrices, RANK, BLOCK), which
    bfloat16 holds exactly. ``records``: (matrices, rows, blocks, bytes); BEGINS: the first
    ones, at levels, are written, otherwise they are added to. ``key_low`` and
    ``key_high``: halves of the key of the random bits, signed. ``first_line``: number of the
    first row; ``first_number``: of a row's first number, of ``num_numbers`` in the whole row.
    """
    matrix = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    down = matrix * num_rows + rows
    ranks = tl.arange(0, PADDED)
    places = ranks[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None]
    sketch = sketches + matrix * (RANK * BLOCK)
    a = tl.load(sketch + places, mask=(ranks < RANK)[None, :], other=0.0)
    octets: tl.constexpr = (RANK * BITS + 7) // 8 + 2
    key = (key_high.to(tl.int64) << 32) | (key_low.to(tl.int64) & 0xFFFFFFFF)
    start = tl.program_id(1) * GROUP
    for block in range(start, min(start + GROUP, blocks)):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        inside = is_row[:, None] & (columns < num_columns)[None, :]
        g = loaded(x + down[:, None] * num_columns + columns[None, :], inside)
        c = entry * product(g, a)
        at = records + (down * blocks + block) * octets
        if BEGINS:
            codes, pattern = level_codes(c, levels, edges, BITS, RANK, PADDED)
        else:
            c += decoded(at, is_row, table, BITS, RANK, PADDED)
            lines, per_row = first_line.to(tl.int64) + down, (num_numbers + 7) // 8
            first = first_number.to(tl.int64) + block * RANK
            if RANK % 8 == 0:
                bits = bits_of_rows(key, lines, first, per_row, PADDED)
            else:
                bits = bits_at(key, lines, first + ranks, per_row)
            codes, pattern = rounded_codes(c, bits, BITS)
        stored(at, is_row, codes, pattern, BITS, RANK, PADDED)
