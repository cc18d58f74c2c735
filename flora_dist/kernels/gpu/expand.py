# SPDX-License-Identifier: Apache-2.0
"""How kernels read a block of a gradient that is known by its sketches: G = C A, in registers.

C is kept in few bits, in bfloat16 or in float32; A is that of the step. Rows are whole, and blocks
are those of the kernel's tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flora_dist.kernels.gpu.access import (
    DRAWN_ENTRY,
    STRIP_GRADIENT,
    STRIP_MATRIX,
    STRIP_MEMBER,
    loaded,
    pointer,
    product,
    sketch_of,
)
from flora_dist.kernels.gpu.codes import decoded


@triton.jit
def drawn_of(
    strip, drawn, BITS: tl.constexpr, DRAWN: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr
):
    """A over its entry (padded rank, WIDTH) of a strip's matrix; whatever, of dense gradients."""
    if BITS == 0:
        a = tl.zeros((1, 1), tl.bfloat16)
    else:
        a = sketch_of(drawn, tl.load(strip + STRIP_MATRIX), DRAWN, PADDED, WIDTH)
    return a


@triton.jit
def block_of(
    strip,
    given,
    multipliers,
    numbers,
    table,
    places,
    a,
    rows,
    inside,
    block,
    num_columns,
    BITS: tl.constexpr,
    DRAWN: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Elements (rows, WIDTH) of a block of a gradient, zeros outside: dense ones at ``places``."""
    if BITS == 0:
        g = loaded(places, inside)
    else:
        g = _expanded(
            strip,
            given,
            multipliers,
            numbers,
            table,
            a,
            rows,
            inside,
            block,
            num_columns,
            BITS,
            DRAWN,
            PADDED,
        )
    return g


@triton.jit
def _expanded(
    strip,
    given,
    multipliers,
    numbers,
    table,
    a,
    rows,
    inside,
    block,
    num_columns,
    BITS: tl.constexpr,
    DRAWN: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Elements (rows, WIDTH) of a block, zeros outside of the matrix.

    ``multipliers``: by member, addresses of what C is multiplied by; 0: nothing is.
    """
    member = tl.load(strip + STRIP_MEMBER)
    is_row = tl.max(inside.to(tl.int32), 1) > 0
    line = tl.load(strip + STRIP_GRADIENT) // num_columns + rows
    ranks = tl.arange(0, PADDED)
    address = tl.load(given + member)
    place = line * tl.cdiv(num_columns, inside.shape[1]) + block
    if BITS < 16:
        start = pointer(address, tl.uint8, False)
        octets: tl.constexpr = (DRAWN * BITS + 7) // 8 + 2
        c = decoded(start + place * octets, is_row, table, BITS, DRAWN, PADDED)
    else:
        if BITS == 16:
            start = pointer(address, tl.bfloat16, False)
        else:
            start = pointer(address, tl.float32, False)
        is_kept = is_row[:, None] & (ranks < DRAWN)[None, :]
        c = loaded(start + place[:, None] * DRAWN + ranks[None, :], is_kept)
    other = tl.load(multipliers + member)
    factor = tl.load(pointer(other, tl.float32, False), mask=other != 0, other=1.0)
    scale = factor * tl.load(numbers + DRAWN_ENTRY)
    return tl.where(inside, product(c, a) * scale, 0.0)
