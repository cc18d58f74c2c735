# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import Tensor

from flora_dist.core.sketch import ops

GEN = torch.Generator().manual_seed(3)
SHAPES = [
    # E, N, W, block, rank, first column
    (1, 5, 32, 8, 2, 0),
    (1, 5, 37, 8, 3, 0),
    (3, 4, 37, 8, 8, 0),
    (2, 3, 16, 8, 2, 24),
    (2, 3, 16, 8, 2, 5),
    (1, 3, 2, 8, 2, 11),
    (1, 1, 1, 1, 1, 4),
    (2, 3, 21, 64, 5, 60),
]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GEN, dtype=torch.float64)


def plain_compress(x: Tensor, a: Tensor, first: int) -> Tensor:
    """One block, one row, one matrix at a time, on global columns."""
    matrices, rows, width = x.shape
    rank, block = a.shape[1:]
    low, high = first // block, -(-(first + width) // block)
    c = torch.zeros(matrices, rows, high - low, rank, dtype=x.dtype)
    for column in range(first, first + width):
        one = x[:, :, None, column - first] * a[:, None, :, column % block]
        c[:, :, column // block - low] += one
    return c


def plain_expand(c: Tensor, a: Tensor, num_columns: int, first: int) -> Tensor:
    block = a.shape[2]
    columns = range(first, first + num_columns)
    return torch.stack(
        [
            (c[:, :, column // block - first // block] * a[:, None, :, column % block]).sum(-1)
            for column in columns
        ],
        dim=-1,
    )


@pytest.mark.parametrize(("e", "n", "w", "block", "rank", "first"), SHAPES)
def test_compress_is_the_sum_over_global_columns(
    e: int, n: int, w: int, block: int, rank: int, first: int
) -> None:
    x, a = rand(e, n, w), rand(e, rank, block)
    c = ops.compress(x, a, first_column=first)
    expected = plain_compress(x, a, first)
    assert c.shape == expected.shape
    assert torch.allclose(c, expected, rtol=0, atol=1e-13 * block)


@pytest.mark.parametrize(("e", "n", "w", "block", "rank", "first"), SHAPES)
def test_expand_is_the_transpose_of_compress(
    e: int, n: int, w: int, block: int, rank: int, first: int
) -> None:
    a = rand(e, rank, block)
    per_row = -(-(first + w) // block) - first // block
    c = rand(e, n, per_row, rank)
    x = ops.expand(c, a, num_columns=w, first_column=first)
    assert x.shape == (e, n, w)
    assert torch.allclose(x, plain_expand(c, a, w, first), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("e", "n", "w", "block", "rank", "first"), SHAPES)
def test_a_change_of_basis_is_expand_then_compress(
    e: int, n: int, w: int, block: int, rank: int, first: int
) -> None:
    del w, first
    old, new = rand(e, rank, block), rand(e, rank + 1, block)
    c = rand(e, n, 3, rank)
    expected = ops.compress(ops.expand(c, old, num_columns=3 * block), new)
    moved = ops.change_basis(c, old, new)
    assert moved.shape == (e, n, 3, rank + 1)
    assert torch.allclose(moved, expected, rtol=0, atol=1e-13 * block)


def test_pieces_of_a_row_add_up_to_the_sketch_of_the_row() -> None:
    x, a = rand(2, 3, 50), rand(2, 3, 16)
    whole = ops.compress(x, a)
    total = torch.zeros_like(whole)
    for low, high in [(0, 7), (7, 7), (7, 41), (41, 50)]:
        if low < high:
            part = ops.compress(x[..., low:high], a, first_column=low)
            total[:, :, low // 16 : low // 16 + part.shape[2]] += part
    assert torch.allclose(total, whole, rtol=0, atol=1e-13)


def test_a_piece_of_a_row_expands_to_the_piece_of_the_row() -> None:
    c, a = rand(2, 3, 4, 3), rand(2, 3, 16)
    whole = ops.expand(c, a, num_columns=60)
    part = ops.expand(c[:, :, 1:3], a, num_columns=20, first_column=19)
    assert torch.allclose(part, whole[..., 19:39], rtol=0, atol=1e-14)


def test_whole_blocks_are_not_copied() -> None:
    x = rand(2, 3, 32)
    assert ops._whole_blocks(x, 8, 16) is x
    assert ops._whole_blocks(x, 8, 4) is not x


def test_inputs_may_be_strided_views() -> None:
    x, a = rand(3, 32, 5), rand(2, 4, 3)
    c = ops.compress(x.mT, a[:1].mT.expand(3, 3, 4))
    assert torch.allclose(c, plain_compress(x.mT, a[:1].mT.expand(3, 3, 4), 0), atol=1e-13)
    back = ops.expand(c.transpose(0, 1).contiguous().transpose(0, 1), rand(3, 3, 4), num_columns=32)
    assert back.shape == (3, 5, 32)


@pytest.mark.parametrize(("e", "n", "w"), [(1, 0, 16), (0, 3, 16), (1, 3, 0)])
def test_nothing_compresses_and_expands_to_nothing(e: int, n: int, w: int) -> None:
    a = rand(e, 2, 8)
    c = ops.compress(rand(e, n, w), a)
    assert c.shape == (e, n, w // 8, 2)
    assert ops.expand(c, a, num_columns=w).shape == (e, n, w)
    assert ops.change_basis(c, a, a).shape == c.shape


def test_blocks_that_do_not_fit_the_columns_are_our_bug() -> None:
    with pytest.raises(AssertionError):
        ops.expand(rand(1, 2, 3, 2), rand(1, 2, 8), num_columns=16)
