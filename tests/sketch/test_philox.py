# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from flora_dist.core.sketch import philox

KEY = 0x0123456789ABCDEF
Grid = Callable[..., Tensor]
GRIDS: list[Grid] = [philox.grid16, philox.grid_signs]


def whole(grid: Grid, rows: int, columns: int, *, key: int = KEY) -> Tensor:
    return grid(key, rows=(0, rows), columns=(0, columns), num_columns=columns, device="cpu")


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def plain_philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 in Python integers, from the paper."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 % 2**32, (p0 >> 32) ^ x3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [x0, x1, x2, x3]


def plain_counter(index: int, stream: int) -> list[int]:
    return plain_philox([index % 2**32, index >> 32, stream, 0], (KEY & 0xFFFFFFFF, KEY >> 32))


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, answer: str) -> None:
    out = philox.philox_4x32_10(torch.tensor(words(counter)), tuple(words(key)))
    assert out.tolist() == words(answer)


def test_philox_equals_the_paper_on_many_counters_and_leaves_them_alone() -> None:
    gen = torch.Generator().manual_seed(1)
    counter = torch.randint(0, 1 << 32, (7, 29, 4), generator=gen)
    before = counter.clone()
    out = philox.philox_4x32_10(counter, (0xFFFFFFFE, 0x80000001))
    assert torch.equal(counter, before)
    for one, got in zip(counter.view(-1, 4).tolist(), out.view(-1, 4).tolist(), strict=True):
        assert plain_philox(one, (0xFFFFFFFE, 0x80000001)) == got


@pytest.mark.parametrize(("rows", "columns"), [(5, 19), (3, 8), (1, 1)])
def test_grid16_is_the_documented_layout(rows: int, columns: int) -> None:
    stride = -(-columns // 8) * 8
    grid = whole(philox.grid16, rows, columns)
    for i in range(rows):
        for j in range(columns):
            element = i * stride + j
            word = plain_counter(element // 8, 0)[element % 8 // 2]
            assert grid[i, j] == (word >> 16 * (element % 2)) & 0xFFFF


@pytest.mark.parametrize(("rows", "columns"), [(3, 150), (2, 128), (1, 1)])
def test_grid_signs_is_the_documented_layout(rows: int, columns: int) -> None:
    stride = -(-columns // 128) * 128
    grid = whole(philox.grid_signs, rows, columns)
    for i in range(rows):
        for j in range(columns):
            element = i * stride + j
            word = plain_counter(element // 128, 1)[element % 128 // 32]
            assert grid[i, j] == 1 - 2 * ((word >> element % 32) & 1)


def test_draws63_is_the_documented_layout() -> None:
    for index, draw in enumerate(philox.draws63(KEY, count=7).tolist()):
        low, high = plain_counter(index // 2, 2)[2 * (index % 2) :][:2]
        assert draw == (low | high << 32) % 2**63


@pytest.mark.parametrize("grid", GRIDS)
def test_a_slice_equals_the_slice_of_the_whole(grid: Grid) -> None:
    gen = torch.Generator().manual_seed(2)
    for num_columns in (1, 7, 8, 130, 1000):
        full = whole(grid, 23, num_columns)
        for _ in range(20):
            top, bottom = sorted(torch.randint(0, 24, (2,), generator=gen).tolist())
            left, right = sorted(torch.randint(0, num_columns + 1, (2,), generator=gen).tolist())
            part = grid(
                KEY,
                rows=(top, bottom),
                columns=(left, right),
                num_columns=num_columns,
                device="cpu",
            )
            assert part.is_contiguous()
            assert torch.equal(part, full[top:bottom, left:right])


@pytest.mark.parametrize("grid", GRIDS)
def test_chunks_do_not_change_the_bits(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"num_columns": 3000, "device": "cpu"}
    rectangles = [{"rows": (1, 9), "columns": (0, 3000)}, {"rows": (2, 7), "columns": (17, 2801)}]
    before = [grid(KEY, **where, **cases) for where in rectangles]
    for chunk in (1, 5, 64, 800):  # single counters, parts of a row, whole rows, several rows
        monkeypatch.setattr(philox, "_CPU_CHUNK", chunk)
        for where, expected in zip(rectangles, before, strict=True):
            assert torch.equal(grid(KEY, **where, **cases), expected)


def test_rows_far_down_use_the_high_word_of_the_counter() -> None:
    row, columns = (1 << 60) // 4096 - 1, 4096  # the element index comes close to 2^60
    part = philox.grid16(
        KEY, rows=(row, row + 1), columns=(4095, 4096), num_columns=columns, device="cpu"
    )
    assert part.item() == plain_counter((row * columns + 4095) // 8, 0)[3] >> 16


@pytest.mark.parametrize("grid", GRIDS)
def test_empty_rectangles_are_empty(grid: Grid) -> None:
    empty = {"num_columns": 40, "device": "cpu"}
    assert grid(KEY, rows=(3, 3), columns=(0, 40), **empty).shape == (0, 40)
    assert grid(KEY, rows=(0, 3), columns=(5, 5), **empty).shape == (3, 0)
    assert grid(KEY, rows=(0, 3), columns=(0, 0), num_columns=0, device="cpu").shape == (3, 0)


def test_grid16_is_uniform() -> None:
    draws = whole(philox.grid16, 512, 1024).double()
    n = draws.numel()
    # The mean of n uniform integers has a standard deviation of 65536 / sqrt(12 n); 4 sigma.
    assert abs(draws.mean().item() - 32767.5) < 4 * 65536 / math.sqrt(12 * n)
    # Chi-square with 15 degrees of freedom, on the high and on the low four bits: 37.7 is
    # exceeded with probability 0.001; too even (below 3.5) with 0.001.
    for bits in (draws.long() >> 12, draws.long() & 15):
        counts = torch.bincount(bits.flatten(), minlength=16).double()
        assert 3.5 < ((counts - n / 16).square() / (n / 16)).sum().item() < 37.7


def test_neighbours_of_grid16_are_not_correlated() -> None:
    centred = whole(philox.grid16, 512, 512).double() - 32767.5
    variance = 65536**2 / 12
    for a, b in [(centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])]:
        assert abs((a * b).mean().item()) < 4 * variance / math.sqrt(a.numel())


def test_grid_signs_are_balanced_and_independent_by_rows_and_columns() -> None:
    signs = whole(philox.grid_signs, 512, 512).double()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    for product in (signs, signs[:, 1:] * signs[:, :-1], signs[1:] * signs[:-1]):
        assert abs(product.mean().item()) < 4 / math.sqrt(product.numel())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("other", [KEY ^ 1, KEY ^ (1 << 63)])
def test_both_halves_of_the_key_matter(grid: Grid, other: int) -> None:
    assert not torch.equal(whole(grid, 4, 256), whole(grid, 4, 256, key=other))


def test_one_key_gives_different_bits_to_different_streams() -> None:
    signs = whole(philox.grid_signs, 1, 128)
    integers = whole(philox.grid16, 1, 8)
    bits = torch.stack([1 - 2 * ((integers >> bit) & 1) for bit in range(16)], dim=-1)
    assert not torch.equal(signs, bits.view(1, 128).to(torch.int8))


def test_the_bits_are_frozen() -> None:
    part = philox.grid16(KEY, rows=(5, 7), columns=(3, 8), num_columns=13, device="cpu")
    assert part.dtype == torch.int32
    assert part.tolist() == GOLDEN_GRID16
    signs = philox.grid_signs(KEY, rows=(5, 6), columns=(120, 136), num_columns=200, device="cpu")
    assert signs.dtype == torch.int8
    assert signs.tolist() == GOLDEN_SIGNS
    assert philox.draws63(KEY, count=3).tolist() == GOLDEN_DRAWS


GOLDEN_GRID16 = [[40983, 35137, 20793, 58191, 60248], [25507, 34125, 52949, 15012, 63519]]
GOLDEN_SIGNS = [[1, 1, -1, -1, -1, 1, -1, 1, 1, -1, 1, 1, 1, 1, 1, -1]]
GOLDEN_DRAWS = [4958388614488131454, 662199818388744812, 7711458327911403489]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("grid", GRIDS)
def test_cuda_gives_the_bits_of_the_cpu(grid: Grid) -> None:
    where = {"rows": (2, 50), "columns": (17, 2801), "num_columns": 3000}
    on_gpu = grid(KEY, **where, device="cuda")
    assert torch.equal(on_gpu.cpu(), grid(KEY, **where, device="cpu"))
