# SPDX-License-Identifier: Apache-2.0
"""How kernels read a block of a gradient that is known by its sketches: G = C A, in registers.

C is kept in few bits, in bfloat16 or in float32; A is that of the step. Blocks are those of the
kernel's tiles, and whole also where rows are cut.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flora_dist.kernels.gpu.access import (
    DRAWN_ENTRY,
    STRIP_GIVEN,
    STRIP_GRADIENT,
    STRIP_MATRIX,
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
    source,
    places,
    inside,
    block,
    BITS: tl.constexpr,
    DRAWN: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Elements (rows, WIDTH) of a block of a gradient, zeros outside: dense ones at ``places``.

    ``source``: strip, given, multipliers, numbers, table, A (``drawn_of``), rows, columns and
    blocks of a row that are here. ``block``: of these.
    """
    return (
        loaded(places, inside)
        if BITS == 0
        else _expanded(source, inside, block, BITS, DRAWN, PADDED)
    )


@triton.jit
def _expanded(source, inside, block, BITS: tl.constexpr, DRAWN: tl.constexpr, PADDED: tl.constexpr):
    """Elements (rows, WIDTH) of a block, zeros outside of the matrix.

    ``multipliers``: addresses of what C is multiplied by; 0: nothing is.
    """
    strip, given, multipliers, numbers, table, a, rows, width, blocks = source
    which = tl.load(strip + STRIP_GIVEN)
    is_row = tl.max(inside.to(tl.int32), 1) > 0
    line = tl.load(strip + STRIP_GRADIENT) // width + rows
    ranks = tl.arange(0, PADDED)
    address = tl.load(given + which)
    place = line * blocks + block
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
    other = tl.load(multipliers + which)
    factor = tl.load(pointer(other, tl.float32, False), mask=other != 0, other=1.0)
    scale = factor * tl.load(numbers + DRAWN_ENTRY)
    return tl.where(inside, product(c, a) * scale, 0.0)
