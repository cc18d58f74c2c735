# SPDX-License-Identifier: Apache-2.0
"""Random bits and stochastic rounding inside a kernel, bit for bit as core/sketch has them.

``core/sketch/philox.py`` says where in the grid of a key an element's 16 bits stand, and
``core/sketch/rounding.py`` what rounding does with them.
"""

from __future__ import annotations

import triton
import triton.language as tl

_PER_COUNTER = tl.constexpr(8)
"""Integers of 16 bits that one counter gives."""


@triton.jit
def words(key, counter):
    """The four words of counters (int64) of the stream of integers."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    nothing = low & 0
    return tl.philox(key, low, high, nothing, nothing)


@triton.jit
def bits_of_rows(key, lines, first, stride, WIDTH: tl.constexpr):
    """Bits (rows, WIDTH) of whole counters; ``first`` and WIDTH are multiples of 8.

    ``lines``: numbers (rows,) of the rows, int64; ``stride``: counters of a row.
    """
    columns = first // _PER_COUNTER + tl.arange(0, WIDTH // _PER_COUNTER)
    w0, w1, w2, w3 = words(key, lines[:, None] * stride + columns[None, :])
    # The last dims become: pair of words, word of the pair, half of the word, the low one first.
    both = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(both & 0xFFFF, both >> 16)
    return tl.reshape(halves, (lines.shape[0], WIDTH)).to(tl.int32)


@triton.jit
def bits_at(key, lines, columns, stride):
    """Bits (rows, columns) of any elements: a counter is drawn for each one."""
    half = columns % _PER_COUNTER
    w0, w1, w2, w3 = words(key, lines[:, None] * stride + (columns // _PER_COUNTER)[None, :])
    word = tl.where((half < 2)[None, :], w0, w1)
    word = tl.where((half >= 4)[None, :], w2, word)
    word = tl.where((half >= 6)[None, :], w3, word)
    return ((word >> (16 * (half % 2)).to(tl.uint32)[None, :]) & 0xFFFF).to(tl.int32)


@triton.jit
def rounded(x, bits, DTYPE: tl.constexpr):
    """Pattern (int16) of ``x`` (float32) in bfloat16 or float16, rounded by 16 random bits."""
    if DTYPE == tl.bfloat16:
        # The bits carry into the half that is kept with the wanted probability; not a NaN's.
        carried = (x.to(tl.int32, bitcast=True) + bits) >> 16
        pattern = tl.where(x == x, carried, 0x7FC0).to(tl.int16)
    else:
        size = _half(tl.abs(x), bits).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        pattern = (size | ((x.to(tl.int32, bitcast=True) >> 16) & 0x8000)).to(tl.int16)
    return pattern


@triton.jit
def _half(x, bits):
    """``x`` (not negative) rounded to a number that float16 holds, or to one beyond its range."""
    exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    exponent = tl.maximum(exponent, -14) - 10
    spacing = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    # A division by a power of two is exact, and so are the floor, the rest and the threshold.
    steps = x / spacing
    whole = tl.floor(steps)
    up = steps - whole >= 1.0 - bits.to(tl.float32) * 0.0000152587890625
    return (whole + tl.where(up, 1.0, 0.0)) * spacing
