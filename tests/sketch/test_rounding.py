# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import Tensor

from flora_dist.core.sketch.philox import grid16
from flora_dist.core.sketch.rounding import round_stochastic

DTYPES = [torch.bfloat16, torch.float16]
# mantissa bits, exponent of the smallest normal number
FORMATS = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}


def bits(*shape: int, key: int = 17) -> Tensor:
    rows = math.prod(shape[:-1])
    grid = grid16(key, rows=(0, rows), columns=(0, shape[-1]), num_columns=shape[-1], device="cpu")
    return grid.view(shape)


def many_values() -> Tensor:
    """Every fp32 exponent and sign with random mantissas, and the edges."""
    gen = torch.Generator().manual_seed(4)
    low, high = -(2**31), 2**31 - 1
    patterns = torch.randint(low, high, (40_000,), generator=gen).to(torch.int32)
    x = patterns.view(torch.float32)
    small = torch.randn(20_000, generator=gen) * torch.logspace(-9, 5, 20_000)
    edges = [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 6e-8, 5.9e-8, 65504.0, 65519.0, 65520.0]
    x = torch.cat([x, small, torch.tensor(edges)])
    return x[x.isfinite()]


def spacing(x: float, dtype: torch.dtype) -> float:
    mantissa, smallest = FORMATS[dtype]
    _, exponent = math.frexp(abs(x))
    exponent = max(exponent - 1, smallest) if x else smallest
    return 2.0 ** (exponent - mantissa)


def formula(x: float, dtype: torch.dtype, u: int) -> float:
    """sign(x) floor(|x| / q + u / 65536) q in exact integer arithmetic; inf above the largest."""
    q = spacing(x, dtype)
    ratio = (abs(x) / q).as_integer_ratio()  # exact: q is a power of two
    steps = (ratio[0] * 65536 + u * ratio[1]) // (ratio[1] * 65536)
    y = math.copysign(steps * q, x)
    return y if abs(y) <= torch.finfo(dtype).max else math.copysign(math.inf, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_equals_the_plain_formula(dtype: torch.dtype) -> None:
    x = many_values()
    u = bits(len(x))
    got = round_stochastic(x, dtype, u)
    assert got.dtype == dtype
    expected = [formula(a, dtype, b) for a, b in zip(x.tolist(), u.tolist(), strict=True)]
    assert got.double().tolist() == expected
    assert torch.equal(got.signbit(), x.signbit())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("u", [0, 1, 32768, 65535])
def test_values_that_the_dtype_holds_never_move(dtype: torch.dtype, u: int) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    exact = every[~every.isnan()].float()
    out = round_stochastic(exact, dtype, torch.full(exact.shape, u, dtype=torch.int32))
    assert torch.equal(out.view(torch.int16), exact.to(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_one_of_the_two_neighbours(dtype: torch.dtype) -> None:
    x = many_values()
    x = x[x.abs() <= torch.finfo(dtype).max]
    zero, top = torch.zeros(x.shape, dtype=torch.int32), torch.full(x.shape, 65535).int()
    down, up = round_stochastic(x, dtype, zero).double(), round_stochastic(x, dtype, top).double()
    got = round_stochastic(x, dtype, bits(len(x))).double()
    assert ((got == down) | (got == up)).all()
    assert (down.abs() <= x.double().abs()).all()
    q = torch.tensor([spacing(value, dtype) for value in x.tolist()], dtype=torch.float64)
    finite = up.isfinite()
    assert ((up - down).abs()[finite] <= q[finite]).all()
    # Down is cut, not rounded to nearest: less than one spacing below.
    assert (x.double().abs() - down.abs() < q).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0 + 2.0**-12, -3.14159, 1e-5, 3.3e-8, -1e-41, 40000.5])
def test_rounding_is_unbiased(dtype: torch.dtype, value: float) -> None:
    n = 100_000
    x = torch.full((n,), value, dtype=torch.float32)
    out = round_stochastic(x, dtype, bits(n)).double()
    q = spacing(x[0].item(), dtype)
    part = (abs(x[0].item()) / q) % 1
    # A Bernoulli choice between two neighbours q apart: 4 sigma, and the 2^-16 q to which 16
    # bits resolve the probability.
    sigma = q * math.sqrt(part * (1 - part) / n)
    assert abs(out.mean().item() - x[0].item()) <= 4 * sigma + q * 2.0**-16


def test_bfloat16_is_exactly_unbiased_over_all_bits() -> None:
    u = torch.arange(65536, dtype=torch.int32)
    for value in (1.0 + 3 * 2.0**-20, -7.7, 1e-40, 2.0 - 2.0**-23):
        x = torch.full((65536,), value, dtype=torch.float32)
        assert round_stochastic(x, torch.bfloat16, u).double().mean().item() == x[0].item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("u", [0, 40000, 65535])
def test_nan_and_infinity_stay_themselves(dtype: torch.dtype, u: int) -> None:
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -(2**23) + 1], dtype=torch.int32)
    x = torch.cat([nans.view(torch.float32), torch.tensor([math.inf, -math.inf])])
    out = round_stochastic(x, dtype, torch.full(x.shape, u, dtype=torch.int32))
    assert out[:5].isnan().all()
    assert out[5:].tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("dtype", DTYPES)
def test_above_the_largest_value_is_the_largest_or_infinity(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.full((2,), largest * (1 + 2.0**-12), dtype=torch.float32)
    out = round_stochastic(x, dtype, torch.tensor([0, 65535], dtype=torch.int32))
    assert out.tolist() == [largest, math.inf]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape_and_stride_will_do(dtype: torch.dtype) -> None:
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(5))
    u = bits(6, 10)
    whole = round_stochastic(x, dtype, u)
    assert torch.equal(round_stochastic(x[:, ::3], dtype, u[:, ::3]), whole[:, ::3])
    assert torch.equal(round_stochastic(x.T, dtype, u.T), whole.T)
    assert round_stochastic(x[:0], dtype, u[:0]).shape == (0, 10)


def test_another_dtype_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"bfloat16 and float16; got torch.float32\. Use x.to"):
        round_stochastic(torch.zeros(1), torch.float32, torch.zeros(1, dtype=torch.int32))
