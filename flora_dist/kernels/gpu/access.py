# SPDX-License-Identifier: Apache-2.0
"""How kernels read the tables that ``tables.py`` and ``inputs.py`` write: places and pointers."""

from __future__ import annotations

import triton
import triton.language as tl

# Of a strip: some rows of one matrix.
STRIP_WEIGHT = tl.constexpr(0)
STRIP_MOMENTUM = tl.constexpr(1)
STRIP_ROW = tl.constexpr(2)
STRIP_MEMBER = tl.constexpr(3)
STRIP_GRADIENT = tl.constexpr(4)
STRIP_MATRIX = tl.constexpr(5)
STRIP_LINE = tl.constexpr(6)
STRIP_ROWS = tl.constexpr(7)
STRIP_STRIDE = tl.constexpr(8)
STRIP_SCRATCH = tl.constexpr(9)
STRIP_TILE = tl.constexpr(10)
STRIP_GIVEN = tl.constexpr(11)
STRIP_FIRST = tl.constexpr(12)
STRIP_WIDTH = tl.constexpr(13)
STRIP_SLOT = tl.constexpr(14)
STRIP_HEAD = tl.constexpr(15)
STRIP_TAIL = tl.constexpr(16)
STRIP_NUMBERS = tl.constexpr(17)

# Of a step's scalars.
BETA2 = tl.constexpr(0)
FRESH = tl.constexpr(1)
LR = tl.constexpr(2)
KEEP = tl.constexpr(3)
EPS = tl.constexpr(4)
BETA1 = tl.constexpr(5)
NEW = tl.constexpr(6)
GAIN = tl.constexpr(7)
CLIP = tl.constexpr(8)
SIGN = tl.constexpr(9)
ENTRY = tl.constexpr(10)
GROWTH = tl.constexpr(11)
SKETCH_EPS = tl.constexpr(12)
DRAWN_ENTRY = tl.constexpr(13)

# Momentum rules, those that keep two moments last, and what a window does to a momentum.
NONE = tl.constexpr(0)
BLEND = tl.constexpr(1)
FLORA = tl.constexpr(2)
STRICT = tl.constexpr(3)
ADEMAMIX = tl.constexpr(4)
SUBSPACE_ADAM = tl.constexpr(5)
APOLLO = tl.constexpr(6)
STAYS = tl.constexpr(0)
MOVES = tl.constexpr(1)
RESETS = tl.constexpr(2)

# What a gradient is divided by: both R and C, R, C, or neither. What bounds an update.
FACTORED = tl.constexpr(0)
BY_ROWS = tl.constexpr(1)
BY_COLUMNS = tl.constexpr(2)
RAW = tl.constexpr(3)
UNBOUNDED = tl.constexpr(0)
CLIPPED = tl.constexpr(1)
GROWING = tl.constexpr(2)
UNSCALED = tl.constexpr(0)
BY_SIZE = tl.constexpr(1)
BY_GROWTH = tl.constexpr(2)

# Triton's interpreter takes the patterns of bfloat16 for integers where it multiplies matrices.
OPERAND = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address of a table as a pointer; ALIGNED: it is a multiple of 16 bytes."""
    found = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def gradient_of(strip, given, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a strip's rows of the gradient begin."""
    start = pointer(tl.load(given + tl.load(strip + STRIP_GIVEN)), DTYPE, ALIGNED)
    before = tl.load(strip + STRIP_GRADIENT)
    if ALIGNED:
        before = tl.multiple_of(before, 8)
    return start + before


@triton.jit
def stretch_of(strip, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Of cut rows: first column, how many, the first block of WIDTH that they touch, how many."""
    first = tl.load(strip + STRIP_FIRST).to(tl.int32)
    width = tl.load(strip + STRIP_WIDTH).to(tl.int32)
    if ALIGNED:
        first, width = tl.multiple_of(first, 16), tl.multiple_of(width, 16)
    touched = first // WIDTH
    return first, width, touched, tl.cdiv(first + width, WIDTH) - touched


@triton.jit
def slot_of(strip, block, blocks):
    """Place of a block's first row among the cut blocks; below 0 where the block is whole.

    ``block``: of the ``blocks`` that the strip touches.
    """
    slot = tl.where(block == 0, tl.load(strip + STRIP_HEAD), -1)
    is_tail = (block > 0) & (block == blocks - 1)
    return tl.where(is_tail, tl.load(strip + STRIP_TAIL), slot)


@triton.jit
def loaded(places, inside):
    """Elements as float32, zeros outside."""
    return tl.load(places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def row_scale(row, NORMALISE: tl.constexpr):
    """What rows are multiplied by, from their R."""
    return tl.rsqrt(row) if NORMALISE < BY_COLUMNS else tl.full(row.shape, 1.0, tl.float32)


@triton.jit
def sketch_of(sketches, matrix, RANK: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """A / ENTRY (PADDED, BLOCK) of one matrix in bfloat16, with rows of zeros beyond its rank."""
    ranks = tl.arange(0, PADDED)
    places = ranks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    start = sketches + matrix * (RANK * BLOCK)
    return tl.load(start + places, mask=(ranks < RANK)[:, None], other=0.0)


@triton.jit
def product(x, a):
    """``x a`` to float32's precision, where bfloat16 holds ``a`` exactly: ``x`` in three parts."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    b = a.to(OPERAND)
    made = tl.dot(middle.to(OPERAND), b, tl.dot(low.to(OPERAND), b))
    return tl.dot(high.to(OPERAND), b, made)
