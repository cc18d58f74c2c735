# SPDX-License-Identifier: Apache-2.0
"""The numbers of a sketch in few bits: one record of bytes per block, with a scale of its own.

Two roundings, both unbiased, into one kind of record:

    round_records   y = s (2 k / L - 1), k = floor((x / s + 1) L / 2 + u),  L = 2^bits - 1, s >= |x|
                    Stochastic: E[y] = x for any x, so it may be done again and again.
    level_records   y = s q(x / RMS(x)), q the nearest level of the normal law (Lloyd, Max),
                    s = |x|^2 / <x, q>. Deterministic, with the least error; unbiased over the
                    random rotation that x comes from, so for a fresh sketch, once. A hadamard
                    sketch is such a rotation nearly: along x exactly; across it the bias measured
                    0.06, 0.02 and 0.001 |x| at 1, 2 and 4 bits, on numbers of uneven size.

Source of the second: EDEN (Vargaftik et al., arXiv 2108.08842, sections 3 and 4). Its relative
squared error is ``LEVEL_ERRORS``; that of the first follows from the largest of a block's numbers.
The scale of the first is the largest magnitude: clipped at 2 to 3 RMS it measured no smaller error
at 4 bits, and a bias.

A record is the numbers' codes, the first in the lowest bits of the first byte, then the scale as
bfloat16, its low byte first; a scale below zero marks levels. At 16 bits a record is the numbers as
bfloat16, without a scale. Shape suffix: R numbers of a block; a record stands in their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from flora_dist.core.records import Code
from flora_dist.core.sketch.rounding import round_stochastic

_UNITS = 65536
"""Of the random integers: u = (integer + 1/2) / 65536."""

# Positive halves of the levels, to all digits of float32. Max, "Quantizing for minimum distortion",
# IRE Transactions on Information Theory, 1960, Table I; to more digits by Lloyd's iteration.
_LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.7978846,),
    2: (0.4527800, 1.5104176),
    4: (
        *(0.1283950, 0.3880483, 0.6567591, 0.9423405),
        *(1.2562312, 1.6180464, 2.0690172, 2.7325896),
    ),
}
LEVEL_BITS = tuple(_LEVELS)
"""Bits that ``level_records`` knows: with more, evenly spaced values lose less than the scale."""
LEVEL_ERRORS = {1: 0.5708, 2: 0.1331, 4: 0.00959}
"""Relative squared error of ``level_records`` on many normal numbers, by bits: D / (1 - D) with D
the distortion of Lloyd's levels (EDEN, section 4)."""


Reader = Callable[[Tensor, Code], Tensor]
"""Numbers (..., R) in float32 of records that lie in one piece."""
_readers: dict[str, Reader] = {}


def read_by(device_type: str, reader: Reader) -> None:
    """Let compiled code read float32 on such devices; its bits must be those of torch's here."""
    _readers[device_type] = reader


def round_records(x_R: Tensor, bits16_R: Tensor, code: Code) -> Tensor:
    """Round each number up or down so that its mean is kept.

    A block that holds NaN or inf stands for such numbers afterwards.

    Args:
        x_R: (..., R) float32 or float64.
        bits16_R: int32 of that shape, in [0, 65536), see `philox.grid16`.
        code: how to write them.

    Returns:
        uint8 (..., bytes).

    >>> x, code = torch.tensor([[0.5, -1.0, 1.0]]), Code(bits=2, numbers=3)
    >>> for integer in (0, 65535):
    ...     records = round_records(x, torch.full((1, 3), integer, dtype=torch.int32), code)
    ...     print([round(y, 3) for y in read_records(records, code, x.dtype)[0].tolist()])
    [0.333, -1.0, 1.0]
    [1.0, -1.0, 1.0]
    """
    assert x_R.shape == bits16_R.shape, (x_R.shape, bits16_R.shape)
    if code.bits == 16:
        return round_stochastic(x_R.float(), torch.bfloat16, bits16_R).view(torch.uint8)
    top = (1 << code.bits) - 1
    scale_1 = _at_least(x_R.abs().amax(-1, keepdim=True))
    # k = floor((x / s + 1) L / 2 + u); a block of zeros has s = 0
    divisor_1 = scale_1.to(x_R.dtype).masked_fill_(scale_1 == 0, 1.0)
    y_R = (x_R / divisor_1).add_(1.0).mul_(top / 2)
    y_R += (bits16_R.to(x_R.dtype) + 0.5) / _UNITS
    codes_R = y_R.floor_().nan_to_num_(0.0).clamp_(0, top).to(torch.uint8)
    return _record(codes_R, scale_1, code)


def level_records(x_R: Tensor, code: Code) -> Tensor:
    """Put each number at the nearest level of the normal law, scaled so that <y, x> = |x|^2.

    Args:
        x_R: (..., R) float32 or float64: a sketch as it was taken, not one rounded before.
        code: how to write them, of 1, 2 or 4 bits.

    Returns:
        uint8 (..., bytes).

    >>> x, code = torch.tensor([[5.0, -3.0]]), Code(bits=1, numbers=2)
    >>> read_records(level_records(x, code), code, x.dtype).round(decimals=1).tolist()  # 34 / 8
    [[4.199999809265137, -4.199999809265137]]
    """
    assert code.bits in LEVEL_BITS, code
    values, _ = level_tables(code.bits, x_R.dtype, x_R.device)
    # Over the largest first: squares of small numbers would be zero.
    largest_1 = x_R.abs().amax(-1, keepdim=True)
    y_R = x_R / largest_1.masked_fill(largest_1 == 0, 1.0)
    square_1 = _sum(y_R.square())
    rms_1 = (square_1 / code.numbers).sqrt_()
    codes_R = _nearest((y_R / rms_1).nan_to_num_(0.0), code.bits)
    # s = |x|^2 / <x, q>
    levels_R = values.index_select(0, codes_R.flatten().int()).view(codes_R.shape)
    along_1 = _sum(levels_R.mul_(y_R))
    scale_1 = largest_1 * (square_1 / along_1.masked_fill_(along_1 == 0, 1.0))
    return _record(codes_R, -scale_1.to(torch.bfloat16), code)


def read_records(records: Tensor, code: Code, dtype: torch.dtype) -> Tensor:
    """The numbers (..., R) that records (..., bytes) stand for, in ``dtype``.

    Zero bytes stand for zeros.
    """
    assert records.shape[-1] == code.bytes, (records.shape, code)
    if dtype == torch.float32 and (reader := _readers.get(records.device.type)) is not None:
        return reader(records, code)
    return read_by_torch(records, code, dtype)


def read_by_torch(records: Tensor, code: Code, dtype: torch.dtype) -> Tensor:
    """The same by torch's operators, on any device."""
    if code.bits == 16:
        return _halves(records).to(dtype)
    codes, scale = records[..., :-2], _halves(records[..., -2:])
    table = value_table(code.bits, dtype, records.device)
    # Levels stand in the second half of the table.
    index = codes.to(torch.int32) + (scale < 0).to(torch.int32) * 256
    values = table.index_select(0, index.flatten())
    values = values.view(*codes.shape[:-1], -1)[..., : code.numbers]
    return values * scale.to(dtype).abs()


def _sum(x_R: Tensor) -> Tensor:
    """(..., 1), halves on halves: every device and every kernel has the same bits."""
    width = x_R.shape[-1]
    room = 1 << (width - 1).bit_length()
    if room != width:
        x_R = torch.nn.functional.pad(x_R, (0, room - width))
    while room > 1:
        room //= 2
        x_R = x_R[..., :room] + x_R[..., room:]
    return x_R


def _record(codes_R: Tensor, scale_1: Tensor, code: Code) -> Tensor:
    per_byte = 8 // code.bits
    missing = -code.numbers % per_byte
    if missing:
        codes_R = torch.nn.functional.pad(codes_R, (0, missing))
    packed = codes_R if per_byte == 1 else _packed(codes_R, code.bits)
    return torch.cat([packed, scale_1.view(torch.uint8)], dim=-1)


def _halves(octets: Tensor) -> Tensor:
    """Pairs of bytes as bfloat16; a copy, since a view has to begin at an even byte."""
    return octets.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)


def _packed(codes_R: Tensor, bits: int) -> Tensor:
    """Several codes in a byte, the first lowest."""
    groups = codes_R.view(*codes_R.shape[:-1], -1, 8 // bits)
    packed: Tensor = groups[..., 0].clone()
    for place in range(1, 8 // bits):
        packed |= groups[..., place] << (place * bits)
    return packed


def _at_least(largest_1: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below: a number above its scale would be cut."""
    below = largest_1.to(torch.bfloat16)
    pattern = below.view(torch.int16)
    return torch.where(below.to(largest_1.dtype) < largest_1, pattern + 1, pattern).view(
        torch.bfloat16
    )


def _nearest(y_R: Tensor, bits: int) -> Tensor:
    """How many edges between levels are not above each number, uint8: the code of its level.

    Bins of equal width have an edge each at the most. To search among all edges took half of the
    time of ``level_records``.
    """
    counts, edges = _bins(bits, y_R.dtype, y_R.device)
    bins = (y_R * _BINS_PER_UNIT).add_(_MIDDLE).clamp_(0, len(counts) - 1).to(torch.int32).flatten()
    is_above_R = y_R >= edges.index_select(0, bins).view(y_R.shape)
    return counts.index_select(0, bins).view(y_R.shape) + is_above_R


_BINS_PER_UNIT, _MIDDLE = 32, 128.5
"""No edge is within a hundredth of a bin's width of its ends: rounding may take a number there for
one of the bin beside, where it gets the same code."""


@functools.cache
def _bins(bits: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(257,) of each bin: edges below it, uint8, and the one in it, infinite if there is none."""
    _, edges = level_tables(bits, torch.float64, torch.device("cpu"))
    places = (edges * _BINS_PER_UNIT + _MIDDLE).long()
    in_bin = torch.full((257,), torch.inf, dtype=torch.float64)
    in_bin[places] = edges
    below = torch.searchsorted(places, torch.arange(257)).to(torch.uint8)
    return below.to(device), in_bin.to(device, dtype)


@functools.cache
def level_tables(bits: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels (2^bits) and the edges between them, ascending."""
    half = torch.tensor(_LEVELS[bits], dtype=torch.float64)
    values = torch.cat([-half.flip(0), half])
    return values.to(device, dtype), ((values[:-1] + values[1:]) / 2).to(device, dtype)


@functools.cache
def value_table(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(512, per byte): values of each byte over the scale, evenly spaced, then of levels."""
    byte = torch.arange(256).unsqueeze(1)
    codes = (byte >> torch.arange(0, 8, bits)) & ((1 << bits) - 1)
    even = 2 * codes.double() / ((1 << bits) - 1) - 1
    if bits not in _LEVELS:
        return torch.cat([even, even]).to(device, dtype)
    values, _ = level_tables(bits, torch.float64, torch.device("cpu"))
    return torch.cat([even, values[codes]]).to(device, dtype)
