# SPDX-License-Identifier: Apache-2.0
"""Numbers in few bits inside a kernel, bit for bit as core/sketch/quantise.py writes them.

A program holds one block of some rows: numbers (rows, PADDED), of which RANK are real and zeros
follow. Launches that write records turn off the fusion of products and sums, which would round
once where torch rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flora_dist.kernels.gpu.access import STRIP_MOMENTUM, STRIP_STRIDE, pointer

_UNIT = tl.constexpr(1.0 / 65536)
_NAN = tl.constexpr(0x7FC0)
_MOST_HALVINGS = tl.constexpr(8)


@triton.jit
def record_of(strip, rows, block, BITS: tl.constexpr, RANK: tl.constexpr):
    """Where the records (rows,) of a momentum's block begin."""
    start = pointer(tl.load(strip + STRIP_MOMENTUM), tl.uint8, False)
    down = rows.to(tl.int64) * tl.load(strip + STRIP_STRIDE)
    return start + down + block * ((RANK * BITS + 7) // 8 + 2)


@triton.jit
def decoded(at, is_row, table, BITS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr):
    """Numbers (rows, PADDED) of records that begin ``at`` (rows,), bytes.

    ``table``: values of each byte over the scale, evenly spaced, then of levels; of 8 to 1 bits.
    """
    per: tl.constexpr = 8 // BITS
    ranks = tl.arange(0, PADDED)
    inside = is_row[:, None] & (ranks < RANK)[None, :]
    octets = tl.load(at[:, None] + (ranks // per)[None, :], mask=inside, other=0).to(tl.int32)
    pattern = _scale_of(at, is_row, (RANK * BITS + 7) // 8)
    size = ((pattern & 0x7FFF) << 16).to(tl.float32, bitcast=True)
    # Levels stand in the second half of the table. A code by itself is a byte, whose first value
    # is its own.
    codes = (octets >> ((ranks % per) * BITS)[None, :]) & ((1 << BITS) - 1)
    is_level = ((pattern & 0x8000) != 0) & ((pattern & 0x7FFF) != 0)
    places = (codes + tl.where(is_level, 256, 0)[:, None]) * per
    return tl.load(table + places, mask=inside, other=0.0) * size[:, None]


@triton.jit
def _scale_of(at, is_row, OCTETS: tl.constexpr):
    low = tl.load(at + OCTETS, mask=is_row, other=0).to(tl.int32)
    return low | (tl.load(at + OCTETS + 1, mask=is_row, other=0).to(tl.int32) << 8)


@triton.jit
def stored(
    at, is_row, codes, pattern, BITS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr
):
    """Write records: codes (rows, PADDED), the first in the lowest bits, then the scale."""
    per: tl.constexpr = 8 // BITS
    octets: tl.constexpr = (RANK * BITS + 7) // 8
    ranks = tl.arange(0, PADDED)
    own = tl.where((ranks < RANK)[None, :], codes, 0) << ((ranks % per) * BITS)[None, :]
    packed = tl.sum(tl.reshape(own, (codes.shape[0], PADDED // per, per)), 2)
    places = tl.arange(0, PADDED // per)
    inside = is_row[:, None] & (places < octets)[None, :]
    tl.store(at[:, None] + places[None, :], packed.to(tl.uint8), mask=inside)
    tl.store(at + octets, (pattern & 0xFF).to(tl.uint8), mask=is_row)
    tl.store(at + octets + 1, ((pattern >> 8) & 0xFF).to(tl.uint8), mask=is_row)


@triton.jit
def rounded_codes(x, bits, BITS: tl.constexpr):
    """Codes and the pattern of the scale, by 16 random bits of each number.

    y = s (2 k / L - 1), k = floor((x / s + 1) L / 2 + u)
    """
    top: tl.constexpr = (1 << BITS) - 1
    largest = tl.max(tl.abs(x), 1)
    # The smallest bfloat16 that is not below: a number above its scale would be cut.
    pattern = (largest.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
    pattern = tl.where(tl.sum((x != x).to(tl.int32), 1) > 0, _NAN, pattern)
    size = (pattern << 16).to(tl.float32, bitcast=True)
    divisor = tl.where(size == 0.0, 1.0, size)
    y = (_quotients(x, divisor) + 1.0) * (top * 0.5)
    y = tl.floor(y + (bits.to(tl.float32) + 0.5) * _UNIT)
    y = tl.where(y == y, y, 0.0)
    return tl.minimum(tl.maximum(y, 0.0), top * 1.0).to(tl.int32), pattern


@triton.jit
def level_codes(x, levels, edges, BITS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr):
    """Codes of the nearest levels of the normal law, and the pattern of the scale.

    y = s q(x / RMS(x)), s = |x|^2 / <x, q>; ``levels`` (2^BITS) and the ``edges`` between them.
    """
    largest = tl.max(tl.abs(x), 1)
    # Over the largest first: squares of small numbers would be zero.
    y = _quotients(x, tl.where(largest == 0.0, 1.0, largest))
    square = _sum(y * y, PADDED)
    rms = _root(tl.div_rn(square, tl.zeros_like(square) + RANK))
    z = _quotients(y, rms)
    z = tl.where(z == z, z, 0.0)
    codes = tl.zeros(x.shape, tl.int32)
    for edge in tl.static_range((1 << BITS) - 1):
        codes += (z >= tl.load(edges + edge)).to(tl.int32)
    along = _sum(tl.load(levels + codes) * y, PADDED)
    scale = largest * tl.div_rn(square, tl.where(along == 0.0, 1.0, along))
    pattern = scale.to(tl.int32, bitcast=True)
    pattern = (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16
    # A scale below zero marks levels.
    return codes, tl.where(scale == scale, pattern, _NAN) ^ 0x8000


@triton.jit
def _quotients(x, by_row):
    """X over a number of each row, correctly rounded without a call, which would spill registers.

    A quotient of two numbers of 24 bits is no nearer than 2^-49 of its size to the middle of two of
    24: what float64 loses of the reciprocal and of the product, 2^-52, carries none over it.
    """
    inverse = 1.0 / by_row.to(tl.float64)
    return (x.to(tl.float64) * inverse[:, None]).to(tl.float32)


@triton.jit
def _root(x):
    """Square roots, correctly rounded without a call, around which registers would be spilled.

    The middle of two neighbours has 25 bits, and its square is exact in float64.
    """
    root = tl.sqrt(x)
    for _ in tl.static_range(2):
        above = (root.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
        middle = (root.to(tl.float64) + above.to(tl.float64)) * 0.5
        root = tl.where(middle * middle < x.to(tl.float64), above, root)
    for _ in tl.static_range(2):
        below = (root.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
        middle = (root.to(tl.float64) + below.to(tl.float64)) * 0.5
        root = tl.where((root > 0.0) & (middle * middle > x.to(tl.float64)), below, root)
    return root


@triton.jit
def _sum(x, PADDED: tl.constexpr):
    """Sums (rows,), halves on halves: every device and every kernel has the same bits."""
    for step in tl.static_range(_MOST_HALVINGS):
        if (PADDED >> step) > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0], 2, PADDED >> (step + 1))), 1)
    return tl.reshape(x, (x.shape[0],))
