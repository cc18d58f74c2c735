# SPDX-License-Identifier: Apache-2.0
"""Random bits and rounded numbers as kernels make them, beside those of core/sketch on the CPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flora_dist.core.sketch.philox import grid16
from flora_dist.core.sketch.rounding import round_stochastic
from flora_dist.kernels.gpu.rounding import bits_at, bits_of_rows, rounded

_KEY = 0x9123456789ABCDEF
# A row far enough that its counters need more than 32 bits.
_LINE, _FIRST, _COLUMNS = 5 + (1 << 33), 64, 203
_ROWS, _WIDTH, _NUMBERS = 8, 64, 1 << 13


@triton.jit
def _draw(key, line, whole_out, each_out, first, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    lines = tl.load(line) + tl.arange(0, ROWS)
    places = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(whole_out + places, bits_of_rows(tl.load(key), lines, first, stride, WIDTH))
    columns = first + tl.arange(0, WIDTH)
    tl.store(each_out + places, bits_at(tl.load(key), lines, columns, stride))


@triton.jit
def _round(x, bits, out, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    places = tl.arange(0, COUNT)
    tl.store(out + places, rounded(tl.load(x + places), tl.load(bits + places), DTYPE))


def wrong_bits(device: str) -> list[str]:
    """What differs from the CPU's own in any bit; empty where nothing does."""
    wrong = []
    key = torch.tensor([_KEY - (1 << 64)], device=device)
    line = torch.tensor([_LINE], device=device)
    whole = torch.zeros((_ROWS, _WIDTH), dtype=torch.int32, device=device)
    each = torch.zeros_like(whole)
    stride = -(-_COLUMNS // 8)
    _draw[(1,)](key, line, whole, each, _FIRST, stride, ROWS=_ROWS, WIDTH=_WIDTH)
    expected = grid16(
        _KEY,
        rows=(_LINE, _LINE + _ROWS),
        columns=(_FIRST, _FIRST + _WIDTH),
        num_columns=_COLUMNS,
        device="cpu",
    )
    for name, found in (("bits of whole counters", whole), ("bits one by one", each)):
        if not torch.equal(found.cpu(), expected):
            wrong.append(name)
    for dtype, name in ((torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)):
        x, bits = _numbers()
        out = torch.zeros(_NUMBERS, dtype=torch.int16, device=device)
        _round[(1,)](x.to(device), bits.to(device), out, COUNT=_NUMBERS, DTYPE=name)
        found, right = out.cpu().view(dtype), round_stochastic(x, dtype, bits)
        same = (found.view(torch.int16) == right.view(torch.int16)) | (
            found.isnan() & right.isnan()
        )
        if not same.all():
            wrong.append(f"rounding to {dtype}")
    return wrong


def _numbers() -> tuple[torch.Tensor, torch.Tensor]:
    """Every kind of float32, NaN and infinity among them, and bits at both ends."""
    draw = torch.Generator().manual_seed(0)
    pattern = torch.randint(-(1 << 31), (1 << 31) - 1, (_NUMBERS,), generator=draw)
    x = pattern.to(torch.int32).view(torch.float32)
    x[::3] = torch.randn(len(x[::3]), generator=draw)
    x[1::3] = 1e-6 * torch.randn(len(x[1::3]), generator=draw)
    x[2:5] = torch.tensor([torch.inf, -torch.inf, -0.0])
    bits = torch.randint(0, 1 << 16, (_NUMBERS,), generator=draw, dtype=torch.int32)
    bits[::5], bits[1::5] = (1 << 16) - 1, 0
    return x, bits
