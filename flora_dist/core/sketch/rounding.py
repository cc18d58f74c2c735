# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding of float32 to bfloat16 and float16, with given random bits.

    y = sign(x) * floor(|x| / q + u / 65536) * q,    u uniform in 0 .. 65535

q is the spacing of the narrow dtype at |x|, constant below its smallest normal number. E[y] = x to
2^-16 of a spacing (exactly for bfloat16, whose cut-off part of float32 has 16 bits), and a value
that the dtype holds never moves.
"""

import torch
from torch import Tensor

_FLOAT32_MANTISSA_BITS = 23
_FLOAT32_EXPONENT_BIAS = 127
_FLOAT64_MANTISSA_BITS = 52
_FLOAT64_EXPONENT_BIAS = 1023
_FLOAT16_MANTISSA_BITS = 10
_FLOAT16_SMALLEST_EXPONENT = -14


def round_stochastic(x: Tensor, dtype: torch.dtype, bits16: Tensor) -> Tensor:
    """Rounds each element up or down with the probability that keeps its mean.

    NaN and infinity stay themselves; a value above the largest finite one may become infinity.

    Args:
        x: float32, any shape.
        dtype: torch.bfloat16 or torch.float16.
        bits16: int32 of the shape of `x`, values in [0, 65536), see `philox.grid16`.

    Returns:
        `x` rounded to `dtype`, same shape.

    Raises:
        ValueError: for another dtype.

    >>> one_and_a_bit = torch.full((4,), 1.0 + 2.0**-9)  # a quarter of the spacing above 1
    >>> u = torch.tensor([0, 32768, 49151, 49152], dtype=torch.int32)
    >>> round_stochastic(one_and_a_bit, torch.bfloat16, u).tolist()
    [1.0, 1.0, 1.0, 1.0078125]
    """
    assert x.dtype == torch.float32, x.dtype
    assert bits16.dtype == torch.int32, bits16.dtype
    assert bits16.shape == x.shape, (bits16.shape, x.shape)
    if dtype == torch.bfloat16:
        return _to_bfloat16(x, bits16)
    if dtype == torch.float16:
        return _to_float16(x, bits16)
    raise ValueError(
        f"stochastic rounding is defined to bfloat16 and float16; got {dtype}. "
        "Use x.to(dtype) for other dtypes."
    )


def _to_bfloat16(x: Tensor, bits16: Tensor) -> Tensor:
    # A float32 is a bfloat16 followed by 16 bits: u added to these carries into the bfloat16 with
    # the wanted probability, across a change of exponent, below the normal numbers and into inf.
    pattern = (x.view(torch.int32) + bits16) >> 16
    # The carry would turn a NaN into zero or infinity.
    return pattern.to(torch.int16).view(torch.bfloat16).masked_fill_(x.isnan(), torch.nan)


def _to_float16(x: Tensor, bits16: Tensor) -> Tensor:
    exponent = ((x.view(torch.int32) >> _FLOAT32_MANTISSA_BITS) & 0xFF) - _FLOAT32_EXPONENT_BIAS
    exponent = exponent.clamp_(min=_FLOAT16_SMALLEST_EXPONENT) - _FLOAT16_MANTISSA_BITS
    # 2^exponent from its bit pattern: torch.ldexp computes it in float32.
    spacing = ((exponent.long() + _FLOAT64_EXPONENT_BIAS) << _FLOAT64_MANTISSA_BITS).view(
        torch.float64
    )
    # float64 holds |x| / q + u / 65536 well enough that the floor is exact: 24 bits of x, and a
    # sum that can miss the next integer only by less than 2^-40.
    steps = (x.double().abs_() / spacing).add_(bits16.double(), alpha=2.0**-16).floor_()
    return torch.copysign(steps.mul_(spacing), x).to(torch.float16)
