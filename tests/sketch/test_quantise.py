# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import pytest
import torch
from torch import Tensor

from flora_dist.core.records import Code
from flora_dist.core.sketch.matrices import sketch_matrices
from flora_dist.core.sketch.philox import grid16
from flora_dist.core.sketch.quantise import (
    _LEVELS,
    LEVEL_BITS,
    LEVEL_ERRORS,
    level_records,
    read_records,
    round_records,
)
from flora_dist.reference import few_bits
from tests.gradients.few_bits import nearest_levels

BITS = (8, 4, 2, 1)
DTYPES = (torch.float32, torch.float64)
NUMBERS = (64, 8, 5, 1)
"""Of a block; 5 leaves a byte ragged at every width, 1 is the narrowest sketch."""


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def uniform(x: Tensor, key: int = 11) -> Tensor:
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    grid = grid16(key, rows=(0, rows), columns=(0, columns), num_columns=columns, device="cpu")
    return grid.view(x.shape)


def rounded(x: Tensor, bits: int, key: int = 11) -> Tensor:
    code = Code(bits=bits, numbers=x.shape[-1])
    return read_records(round_records(x, uniform(x, key), code), code, x.dtype)


def levelled(x: Tensor, bits: int) -> Tensor:
    code = Code(bits=bits, numbers=x.shape[-1])
    return read_records(level_records(x, code), code, x.dtype)


def error_of(estimate: Tensor, x: Tensor) -> float:
    return ((estimate - x).square().sum() / x.square().sum()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("numbers", NUMBERS)
def test_rounding_equals_the_plain_formula(bits: int, numbers: int, dtype: torch.dtype) -> None:
    x = normal(3, 40, numbers, dtype=dtype) * torch.logspace(-20, 15, 40, dtype=dtype).unsqueeze(1)
    x[0, 0] = 0.0
    expected = few_bits(x, bits, uniform(x))
    got = rounded(x, bits)
    rtol = 1e-5 if dtype == torch.float32 else 1e-13
    apart = (got - expected).abs() / expected.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    if dtype == torch.float32 and bits == 8:  # 24 bits do not hold k < 256 and the 17 bits of u
        assert (apart > rtol).float().mean() < 0.01
        rtol = 2.01 / 255
    assert (apart <= rtol).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", LEVEL_BITS)
@pytest.mark.parametrize("numbers", NUMBERS)
def test_levels_equal_the_plain_formula(bits: int, numbers: int, dtype: torch.dtype) -> None:
    x = normal(500, numbers, dtype=dtype) * torch.logspace(-15, 15, 500, dtype=dtype).unsqueeze(1)
    half = torch.tensor(_LEVELS[bits], dtype=dtype)
    expected = nearest_levels(x, torch.cat([-half.flip(0), half]))
    # The scale may round to the next bfloat16, 2^-8 away.
    close = (levelled(x, bits) - expected).abs() <= 1e-6 * expected.abs()
    assert close.float().mean() > 0.99
    assert ((levelled(x, bits) - expected).abs() <= 2.0**-7 * expected.abs()).all()


@pytest.mark.parametrize("bits", BITS)
def test_rounding_keeps_the_mean_of_every_number(bits: int) -> None:
    n, x = 20_000, normal(64)
    x[:3] = torch.tensor([0.0, x.abs().max().item(), -1e-6])
    mean = rounded(x.expand(n, 64).contiguous(), bits).mean(0)
    step = 2 * x.abs().max() * (1 + 2.0**-7) / ((1 << bits) - 1)
    # A Bernoulli choice between neighbours one step apart: 5 sigma for 64 numbers, and what 16
    # random bits resolve.
    assert ((mean - x).abs() <= step * (5 * 0.5 / math.sqrt(n) + 2.0**-16)).all()


@pytest.mark.parametrize(("bits", "error"), [(8, 7.2e-5), (4, 0.0202), (2, 0.51), (1, 6.0)])
def test_rounding_errs_as_much_as_said(bits: int, error: float) -> None:
    x = normal(4000, 64)
    # The error of one block has a relative spread of about 0.3, that of 4000 of 0.005.
    assert error_of(rounded(x, bits), x) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("bits", LEVEL_BITS)
def test_levels_are_those_of_lloyd_and_their_error_is_edens(bits: int) -> None:
    half = _LEVELS[bits]
    edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(half)), math.inf]
    densities = [math.exp(-e * e / 2) / math.sqrt(2 * math.pi) for e in edges]
    below = [0.5 * (1 + math.erf(e / math.sqrt(2))) for e in edges]
    means = [
        (densities[i] - densities[i + 1]) / (below[i + 1] - below[i]) for i in range(len(half))
    ]
    # Lloyd's condition: every level is the mean of the numbers nearest to it.
    assert list(half) == pytest.approx(means, abs=2e-7)
    x = normal(400, 4096)
    assert error_of(levelled(x, bits), x) == pytest.approx(LEVEL_ERRORS[bits], rel=0.01)


ROTATIONS = 2000


def estimates(x: Tensor, rotation: Tensor, bits: int) -> Tensor:
    """One per rotation (ROTATIONS, B, B)."""
    turned = (rotation @ x.unsqueeze(1)).squeeze(2)
    return (levelled(turned, bits).unsqueeze(1) @ rotation).squeeze(1)


def uneven() -> Tensor:
    return normal(64, seed=8) * torch.linspace(0.2, 2.0, 64)


@pytest.mark.parametrize("bits", LEVEL_BITS)
def test_levels_are_unbiased_over_all_rotations(bits: int) -> None:
    x, (rotation, _) = uneven(), torch.linalg.qr(normal(ROTATIONS, 64, 64))
    y = estimates(x, rotation, bits)
    # <y, x> = |x|^2 up to the rounding of the scale.
    torch.testing.assert_close(y @ x, (x @ x).expand(ROTATIONS), rtol=2.0**-8, atol=0)
    # The mean's error is D |x|^2 / n in 63 directions: chi^2 has a spread of sqrt(2 / 63) = 0.18.
    expected = LEVEL_ERRORS[bits] * (x @ x) / ROTATIONS
    assert (y.mean(0) - x).square().sum() <= expected * (1 + 5 * 0.18)


@pytest.mark.parametrize(("bits", "bias"), [(1, 0.09), (2, 0.03), (4, 0.01)])
def test_under_a_hadamard_sketch_levels_are_nearly_unbiased(bits: int, bias: float) -> None:
    """Along x exactly; what is left is small beside the noise, sqrt(0.57) at 1 bit."""
    x = uneven()
    rotation = sketch_matrices(
        "hadamard",
        keys=range(ROTATIONS),
        rank=64,
        block=64,
        dtype=torch.float64,
        device="cpu",
    )
    y = estimates(x, rotation, bits)
    torch.testing.assert_close(y @ x, (x @ x).expand(ROTATIONS), rtol=2.0**-8, atol=0)
    noise = LEVEL_ERRORS[bits] / ROTATIONS
    assert (y.mean(0) - x).square().sum() <= (bias**2 + noise * 1.9) * (x @ x)


@pytest.mark.parametrize("bits", [16, *BITS])
def test_rounding_may_be_repeated_without_bias(bits: int) -> None:
    n, x = 4000, normal(16)
    y = x.expand(n, 16).contiguous()
    code = Code(bits=bits, numbers=16)
    spread = torch.zeros(16, dtype=torch.float64)
    for key in range(6):
        before = y
        y = read_records(round_records(y, uniform(y, key), code), code, y.dtype)
        spread += (y - before).square().mean(0)
    assert ((y.mean(0) - x).abs() <= 5 * (spread / n).sqrt() + x.abs() * 2.0**-15).all()


@pytest.mark.parametrize("bits", [16, *BITS])
def test_numbers_are_packed_from_the_lowest_bits_of_the_first_byte(bits: int) -> None:
    x = torch.tensor([[1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0]])
    code = Code(bits=bits, numbers=9)
    record = round_records(x, uniform(x), code)[0].tolist()
    one = [0x80, 0x3F]  # 1.0 as a bfloat16, its low byte first
    assert (
        record
        == {
            16: [*one, *[0x80, 0xBF] * 7, *one],
            8: [255, *[0] * 7, 255, *one],
            4: [15, 0, 0, 0, 15, *one],
            2: [3, 0, 3, *one],
            1: [1, 1, *one],
        }[bits]
    )
    if bits in LEVEL_BITS:  # the same order; a scale below zero marks levels
        levels = level_records(x, code)[0].tolist()
        assert levels[:-2][0] & 1 == 1
        assert levels[-1] & 0x80


@pytest.mark.parametrize("bits", BITS)
def test_blocks_know_nothing_of_each_other(bits: int) -> None:
    x = normal(6, 7, 8)
    whole = rounded(x, bits)
    code = Code(bits=bits, numbers=8)
    some = round_records(x[2:5, 3:], uniform(x)[2:5, 3:], code)
    assert torch.equal(read_records(some, code, x.dtype), whole[2:5, 3:])


@pytest.mark.parametrize("bits", [16, *BITS])
def test_zero_bytes_stand_for_zeros_and_zeros_stay(bits: int) -> None:
    code = Code(bits=bits, numbers=12)
    assert not read_records(
        torch.zeros(3, code.bytes, dtype=torch.uint8), code, torch.float32
    ).any()
    zeros = torch.zeros(3, 12)
    assert not rounded(zeros, bits).any()
    if bits in LEVEL_BITS:
        assert not levelled(zeros, bits).any()


@pytest.mark.parametrize("bits", [16, *BITS])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_shows(bits: int, value: float) -> None:
    x = normal(2, 8, dtype=torch.float32)
    x[0, 3] = value
    found = [rounded(x, bits), *([levelled(x, bits)] if bits in LEVEL_BITS else [])]
    for y in found:
        assert not y[0].sum().isfinite()
        assert y[1].isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_records_take_the_bytes_that_are_counted(bits: int) -> None:
    for numbers in NUMBERS:
        x = normal(4, numbers)
        code = Code(bits=bits, numbers=numbers)
        assert round_records(x, uniform(x), code).shape == (4, math.ceil(numbers * bits / 8) + 2)


@pytest.mark.parametrize("bits", BITS)
def test_no_number_is_cut_by_its_scale(bits: int) -> None:
    x = normal(1000, 4, dtype=torch.float64) * 1e-3
    largest = x.abs().max(-1, keepdim=True).values
    at_top = x.abs() == largest
    y = rounded(x, bits)
    assert (y.abs()[at_top] <= largest.flatten() * (1 + 2.0**-7)).all()
    top = torch.full_like(x, 65535).int()
    code = Code(bits=bits, numbers=4)
    up = read_records(round_records(x.abs(), top, code), code, x.dtype)
    assert (up >= x.abs() * (1 - 1e-12)).all()
