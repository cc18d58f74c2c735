# SPDX-License-Identifier: Apache-2.0
"""The sketch laws by sampling, on a random anisotropic matrix, through compress and expand.

Every tolerance is a number of standard errors measured on the same samples.
"""

import math

import pytest
import torch
from torch import Tensor

from flora_dist.core.sketch import ops
from flora_dist.core.sketch.keys import Purpose, derive_key
from flora_dist.core.sketch.matrices import KINDS, relative_noise, shrink_factor, sketch_matrix

SAMPLES = 4000
BLOCK, RANK, ROWS = 16, 4, 3
WIDTHS = [BLOCK, 2 * BLOCK + 5]  # full blocks, and a ragged last block of 5


def anisotropic(width: int) -> Tensor:
    """(ROWS, width) float64, columns over two orders of magnitude and rows correlated."""
    gen = torch.Generator().manual_seed(width)
    scale = torch.logspace(-2, 0, width, dtype=torch.float64).flip(0)
    mix = torch.eye(ROWS, dtype=torch.float64) + 0.8
    return mix @ (torch.randn(ROWS, width, generator=gen, dtype=torch.float64) * scale)


def sketches(kind: str, *, window: int = 0, samples: int = SAMPLES, rank: int = RANK) -> Tensor:
    """Independent draws (samples, rank, BLOCK), one per matrix index."""
    return torch.stack([
        sketch_matrix(
            kind,
            key=derive_key(
                seed=5, name_key=9, purpose=Purpose.MOMENTUM, window=window, matrix=sample
            ),
            rank=rank,
            block=BLOCK,
            dtype=torch.float64,
            device="cpu",
        )
        for sample in range(samples)
    ])  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def drawn(request: pytest.FixtureRequest) -> tuple[str, Tensor]:
    return request.param, sketches(request.param)


def estimates(g: Tensor, sketch_ERB: Tensor) -> Tensor:
    c = ops.compress(g.expand(len(sketch_ERB), *g.shape), sketch_ERB)
    return ops.expand(c, sketch_ERB, num_columns=g.shape[1])


def by_blocks(x: Tensor) -> Tensor:
    """Squared norms of the blocks of each row, (..., ROWS, K)."""
    missing = -x.shape[-1] % BLOCK
    padded = torch.nn.functional.pad(x, (0, missing))
    return padded.unflatten(-1, (-1, BLOCK)).square().sum(-1)


@pytest.mark.parametrize("width", WIDTHS)
def test_expanding_what_was_compressed_is_unbiased(drawn: tuple[str, Tensor], width: int) -> None:
    _, a = drawn
    g = anisotropic(width)
    error = estimates(g, a) - g
    z = error.mean(0) / (error.std(0) / math.sqrt(SAMPLES))
    # 111 correlated normal numbers at most exceed 4.5 sigma with probability below 0.001.
    assert z.abs().max() < 4.5
    # Nor is there a small bias along G everywhere: 4 sigma on the projection.
    along = (error * g).sum((-1, -2))
    assert abs(along.mean()) < 4 * along.std() / math.sqrt(SAMPLES)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_squared_error_is_the_relative_noise_in_every_block(
    drawn: tuple[str, Tensor], width: int
) -> None:
    kind, a = drawn
    g = anisotropic(width)
    relative = by_blocks(estimates(g, a) - g) / by_blocks(g)
    sigma = relative.std(0) / math.sqrt(SAMPLES)
    for k, start in enumerate(range(0, width, BLOCK)):
        last = min(BLOCK, width - start)
        noise = relative_noise(kind, rank=RANK, block=BLOCK, width=last)
        if last == BLOCK:
            assert noise == relative_noise(kind, rank=RANK, block=BLOCK)
        # 4 sigma, and 1e-12 where the law is exact in each draw (a full hadamard block).
        assert ((relative[:, :, k].mean(0) - noise).abs() <= 4 * sigma[:, k] + 1e-12).all()


def test_the_norm_of_a_sketch_is_unbiased(drawn: tuple[str, Tensor]) -> None:
    _, a = drawn
    g = anisotropic(BLOCK)
    squares = ops.compress(g.expand(SAMPLES, *g.shape), a).square().sum((1, 2, 3))
    sigma = squares.std() / math.sqrt(SAMPLES)
    assert abs(squares.mean() - g.square().sum()) < 4 * sigma


def test_the_shrink_factor_is_the_least_squares_scale(drawn: tuple[str, Tensor]) -> None:
    kind, a = drawn
    g = anisotropic(BLOCK)
    back = estimates(g, a)
    # argmin_s E|s g' - g|^2 = E<g', g> / E|g'|^2. Its residual at s, E<g', s g' - g>, is 0.
    s = shrink_factor(kind, rank=RANK, block=BLOCK)
    residual = (back * (s * back - g)).sum((-1, -2))
    assert abs(residual.mean()) < 4 * residual.std() / math.sqrt(SAMPLES) + 1e-12
    assert math.isclose(s, 1 / (1 + relative_noise(kind, rank=RANK, block=BLOCK)), rel_tol=1e-14)


def test_a_transfer_scaled_by_the_shrink_factor_never_grows(drawn: tuple[str, Tensor]) -> None:
    kind, a = drawn
    new = sketches(kind, window=1)
    g = anisotropic(BLOCK)
    c = ops.compress(g.expand(SAMPLES, *g.shape), a)
    s = shrink_factor(kind, rank=RANK, block=BLOCK)
    moved = s * ops.change_basis(c, a, new)
    before, after = (ops.expand(x, b, num_columns=BLOCK) for x, b in ((c, a), (moved, new)))
    change = s * before.square().sum((1, 2)) - after.square().sum((1, 2))
    # E|s D A^T A|^2 = s |D|^2, since s = 1 / (1 + c) and the new A is independent of D.
    assert abs(change.mean()) < 4 * change.std() / math.sqrt(SAMPLES)


def test_hadamard_gives_everything_back_at_rank_equal_to_block() -> None:
    g = anisotropic(2 * BLOCK + 5)
    back = estimates(g, sketches("hadamard", samples=3, rank=BLOCK))
    assert (back - g).abs().max() < 1e-14 * BLOCK
    assert relative_noise("hadamard", rank=BLOCK, block=BLOCK) == 0
    assert shrink_factor("hadamard", rank=BLOCK, block=BLOCK) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_one_column_has_the_noise_of_one_number(kind: str) -> None:
    expected = {"hadamard": 0.0, "gaussian": 2 / 3, "rademacher": 0.0}[kind]
    assert relative_noise(kind, rank=3, block=4, width=1) == expected
    assert relative_noise("hadamard", rank=1, block=1) == 0
