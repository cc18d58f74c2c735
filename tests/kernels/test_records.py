# SPDX-License-Identifier: Apache-2.0
"""Sketches in few bits by the compiled kernels are those of torch's operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flora_dist.core.records import Code
from flora_dist.core.sketch.matrices import entry_scale, sketch_matrices
from flora_dist.core.sketch.quantise import LEVEL_BITS, read_by_torch, read_records
from flora_dist.kernels.records import Draws, add_to_records_, merged_records, read
from flora_dist.kernels.sketching import RowSketch
from tests.kernels.paths import path

BITS = (16, 8, 4, 2, 1)
NUMBERS = (64, 12, 5, 100)
"""Of a block: a power of two, two that fill neither a vector nor a byte, and many."""


def draws_of(lines: int, blocks: int, numbers: int) -> Draws:
    """In two runs, from a place that is no multiple of eight numbers."""
    first = 3 * numbers
    return Draws(
        key=(1 << 63) + 7,
        runs=((2, 3), (1 << 33, (1 << 33) + lines - 1)),
        columns=(first, first + blocks * numbers),
        num_columns=(blocks + 5) * numbers,
    )


def numbers_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Of all sizes, with blocks of zeros and of what is not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= torch.logspace(-20, 20, shape[0]).view(-1, *[1] * (len(shape) - 1))
    x[0, 0] = 0.0
    x[1, 0, 0], x[2, 0, 0] = torch.nan, torch.inf
    return x


def merged(name: str, bits: int, numbers: int, *, puts_at_levels: bool) -> Tensor:
    """Q(sum / 3) of numbers in full, by a path."""
    sources = [numbers_of((7, 3, numbers), seed) for seed in range(3)]
    draws = None if puts_at_levels else draws_of(7, 3, numbers)
    code = Code(bits=bits, numbers=numbers)
    with path(name):
        return merged_records(sources, None, code, draws, divisor=3.0, dtype=torch.float32)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("bits", BITS)
def test_rounded_numbers_have_the_bits_of_torchs_operators(bits: int, numbers: int) -> None:
    expected, own = (merged(name, bits, numbers, puts_at_levels=False) for name in PATHS)
    assert_equal(own, expected, Code(bits=bits, numbers=numbers))


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("bits", LEVEL_BITS)
def test_numbers_at_levels_have_the_bits_of_torchs_operators(bits: int, numbers: int) -> None:
    expected, own = (merged(name, bits, numbers, puts_at_levels=True) for name in PATHS)
    assert_equal(own, expected, Code(bits=bits, numbers=numbers))


@pytest.mark.parametrize("bits", LEVEL_BITS)
def test_what_is_no_number_stays_in_its_block(bits: int) -> None:
    """Twelve numbers fill no power of two: what stands behind them must not be the last block's."""
    gradient = torch.randn(1, 2, 4 * 16)
    gradient[0, 0, 3] = torch.nan
    drawn = sketch_matrices(
        "hadamard", keys=[1], rank=12, block=16, dtype=torch.float32, device="cpu"
    )
    scale = entry_scale("hadamard", rank=12)
    sketch = RowSketch(matrices_ERB=drawn, first_column=0, is_hadamard=True, scale=scale)
    code = Code(bits=bits, numbers=12)
    records = torch.zeros(1, 2, 4, code.bytes, dtype=torch.uint8)
    with path("native"):
        add_to_records_(records, gradient, sketch, code, None)
    is_nan = read_records(records, code, torch.float32).isnan().any(-1)
    assert is_nan.sum() == 1


def test_records_are_read_in_float32_whatever_the_default() -> None:
    code = Code(bits=4, numbers=64)
    records = merged("native", 4, 64, puts_at_levels=True)
    expected = read_by_torch(records, code, torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        with path("native"):
            found = read(records, code)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


PATHS = ("torch", "native")


def assert_equal(own: Tensor, expected: Tensor, code: Code) -> None:
    """Byte for byte, but for what a NaN looks like."""
    values = read_records(expected, code, torch.float32)
    known = ~values.isnan().any(-1)
    assert known.sum() >= known.numel() - 2
    assert torch.equal(own[known], expected[known])
    assert read_records(own, code, torch.float32)[~known].isnan().any(-1).all()


# Experts, cut blocks at both ends, fewer numbers than a block has, more blocks than are in work
# together, blocks that fill no vector.
SHAPES = [
    ((2, 5, 40), 16, 8, 16),
    ((1, 9, 70), 64, 60, 24),
    ((1, 40, 1280), 64, 0, 64),
    ((1, 6, 700), 256, 0, 64),
    ((3, 4, 11), 4, 1, 4),
]
CASES = [
    (shape, bits, dtype)
    for shape in SHAPES
    for bits, dtype in (
        (16, torch.float32),
        (8, torch.float16),
        (4, torch.bfloat16),
        (4, torch.float32),
        (2, torch.float32),
        (1, torch.bfloat16),
    )
]


@pytest.mark.parametrize(("shape", "bits", "dtype"), CASES, ids=str)
def test_records_of_summed_gradients_are_those_of_torchs_operators(
    shape: tuple[tuple[int, int, int], int, int, int], bits: int, dtype: torch.dtype
) -> None:
    expected, own = (added(name, shape, bits, dtype) for name in PATHS)
    code = Code(bits=bits, numbers=shape[-1])
    rounded_apart, most = ties(own, expected, code)
    assert rounded_apart <= most


def ties(own: Tensor, expected: Tensor, code: Code) -> tuple[int, float]:
    """Blocks with a number on the other side of an edge, and how many there may be.

    Products are summed in another order, which is some 1e-6 of a number: over steps of a grid
    that is the chance of a tie. The first gradient's ties stay in the sum, and a scale that is
    rounded apart takes all of its block along: blocks are counted.
    """
    differs = (own != expected).any(-1)
    step = 2.0**-8 if code.bits == 16 else 2.0 / ((1 << code.bits) - 1)
    chance = 3 * code.numbers * 2e-6 / step + 3 * 1e-6 * 2**8
    count = chance * differs.numel()
    return int(differs.sum()), count + 5 * count**0.5 + 1


def test_records_do_not_depend_on_the_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(added("native", ((3, 200, 300), 64, 0, 64), 4, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def added(
    name: str, shape: tuple[tuple[int, int, int], int, int, int], bits: int, dtype: torch.dtype
) -> Tensor:
    """Records of three gradients' sum, by a path."""
    sizes, block, first, rank = shape
    matrices, rows, width = sizes
    blocks = -(-(first + width) // block) - first // block
    code, generator = Code(bits=bits, numbers=rank), torch.Generator().manual_seed(0)
    records = torch.zeros((matrices, rows, blocks, code.bytes), dtype=torch.uint8)
    sketch = RowSketch(
        matrices_ERB=sketch_matrices(
            "hadamard",
            keys=range(matrices),
            rank=rank,
            block=block,
            dtype=torch.float32,
            device="cpu",
        ),
        first_column=first,
        is_hadamard=True,
        scale=entry_scale("hadamard", rank=rank),
    )
    for number in range(3):
        gradient = torch.randn(sizes, generator=generator).to(dtype)
        draws = draws_of(matrices * rows, blocks, rank)
        with path(name):
            is_fresh = number == 0 and bits in LEVEL_BITS
            add_to_records_(records, gradient, sketch, code, None if is_fresh else draws)
    return records


@pytest.mark.parametrize("bits", BITS)
def test_records_are_read_as_by_torchs_operators(bits: int) -> None:
    code = Code(bits=bits, numbers=12)
    records = merged("torch", bits, 12, puts_at_levels=bits in LEVEL_BITS)[3:, 1:]
    with path("native"):
        own = read_records(records, code, torch.float32)
    assert torch.equal(own, read_by_torch(records, code, torch.float32))


@pytest.mark.parametrize(("kept", "sent"), [(4, 1), (4, 4), (2, 8), (16, 8), (1, 2)])
def test_records_are_merged_into_those_of_torchs_operators(kept: int, sent: int) -> None:
    codes = Code(bits=kept, numbers=12), Code(bits=sent, numbers=12)
    at_levels = (kept in LEVEL_BITS, False, False)
    sources = [merged("torch", kept, 12, puts_at_levels=each)[3:] for each in at_levels]
    found = []
    for name in PATHS:
        with path(name):
            draws = draws_of(4, 3, 12)
            found.append(merged_records(sources, *codes, draws, divisor=3.0, dtype=torch.float32))
    assert torch.equal(*found)
    if sent in LEVEL_BITS:
        found = []
        for name in PATHS:
            with path(name):
                found.append(
                    merged_records(sources[:1], *codes, None, divisor=1.0, dtype=torch.float32)
                )
        assert torch.equal(*found)
