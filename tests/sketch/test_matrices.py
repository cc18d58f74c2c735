# SPDX-License-Identifier: Apache-2.0
import hashlib
import math

import pytest
import torch
from torch import Tensor

from flora_dist.core.sketch import matrices
from flora_dist.core.sketch.keys import Purpose, derive_key
from flora_dist.core.sketch.matrices import KINDS, sketch_matrices, sketch_matrix
from flora_dist.core.sketch.philox import draws63, grid16, grid_signs

KEY = 0x0123456789ABCDEF


def draw(
    kind: str,
    *,
    key: int = KEY,
    rank: int = 4,
    block: int = 16,
    columns: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    return sketch_matrix(
        kind, key=key, rank=rank, block=block, columns=columns, dtype=dtype, device="cpu"
    )


def sylvester(n: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@pytest.mark.parametrize(("rank", "block"), [(1, 1), (1, 2), (3, 8), (8, 64), (64, 64), (5, 2048)])
def test_hadamard_is_rows_of_the_sylvester_matrix_times_signs(rank: int, block: int) -> None:
    draws = draws63(KEY, count=block).tolist()
    rows = sorted(range(block), key=lambda row: draws[row])[:rank]
    signs = grid_signs(KEY, rows=(0, 1), columns=(0, block), num_columns=block, device="cpu")
    expected = sylvester(block)[rows] * signs * (1 / math.sqrt(rank))
    assert torch.equal(draw("hadamard", rank=rank, block=block), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "block"), [(1, 1), (1, 2), (3, 8), (8, 64), (5, 2048)])
def test_matrices_drawn_together_are_those_drawn_alone(
    kind: str, rank: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "_PASS_NUMBERS", 4 * rank * block)  # several passes
    keys = [KEY, 0, 1, (1 << 64) - 1, *range(1 << 32, (1 << 32) + 6)]
    for dtype in (torch.float32, torch.float64):
        where = {"rank": rank, "block": block, "dtype": dtype}
        drawn = sketch_matrices(kind, keys=keys, device="cpu", **where)
        assert torch.equal(drawn, torch.stack([draw(kind, key=key, **where) for key in keys]))


def test_no_keys_draw_no_matrices() -> None:
    where = {"rank": 2, "block": 8, "dtype": torch.float32, "device": "cpu"}
    assert sketch_matrices("hadamard", keys=[], **where).shape == (0, 2, 8)


@pytest.mark.parametrize(("rank", "block"), [(1, 1), (3, 8), (8, 64), (64, 64), (5, 2048)])
def test_hadamard_rows_are_orthogonal(rank: int, block: int) -> None:
    a = draw("hadamard", rank=rank, block=block)
    gram = a @ a.T
    expected = block / rank * torch.eye(rank, dtype=torch.float64)
    # Sums of `block` products of one magnitude: block roundings of eps at most.
    assert (gram - expected).abs().max() <= block * 2.3e-16 * block / rank


def test_hadamard_is_lossless_at_rank_equal_to_block() -> None:
    a = draw("hadamard", rank=32, block=32)
    assert torch.allclose(a.T @ a, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-14)


def test_every_row_of_the_hadamard_matrix_is_drawn_equally_often() -> None:
    counts = torch.zeros(8)
    for key in range(800):
        rows = torch.argsort(draws63(key, count=8), stable=True)[:2]
        counts[rows] += 1
    # 200 expected of each; chi-square with 7 degrees of freedom exceeds 24.3 with probability
    # 0.001, and drawing without replacement only makes it smaller.
    assert ((counts - 200).square() / 200).sum() < 24.3


def test_gaussian_entries_are_table_values_of_the_grid() -> None:
    table, variance = matrices._gaussian_table(torch.device("cpu"))
    index = grid16(KEY, rows=(0, 4), columns=(0, 21), num_columns=21, device="cpu")
    expected = table.double()[index.long()] * (1 / math.sqrt(4 * variance))
    assert torch.equal(draw("gaussian", block=21), expected)


def test_the_gaussian_table_is_an_exact_law() -> None:
    table, variance = matrices._gaussian_table(torch.device("cpu"))
    assert torch.equal(table, -table.flip(0))
    assert torch.equal(table, table.bfloat16().float())
    assert table.diff().min() >= 0
    # The mean square is exact up to the last bit of a float64 sum in another order.
    assert math.isclose(table.double().square().mean().item(), variance, rel_tol=1e-12)
    # bfloat16 has 8 significant bits: rounding to nearest errs by 2^-8 of a value at most.
    levels = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    exact = torch.special.ndtri(levels)
    assert ((table - exact).abs() <= exact.abs() * 2.0**-8).all()


def test_the_gaussian_table_is_frozen_and_safe_from_other_math_libraries() -> None:
    table, variance = matrices._gaussian_table(torch.device("cpu"))
    assert hashlib.sha256(table.numpy().astype("<f4").tobytes()).hexdigest() == GOLDEN_TABLE
    assert variance == GOLDEN_VARIANCE
    # No quantile lies so near the middle of two bfloat16 values that an error of 1e-10 in ndtri
    # could round it to the other one: another libm gives the same table.
    upper = torch.special.ndtri((torch.arange(32768, 65536, dtype=torch.float64) + 0.5) / 65536)
    for nudge in (1 - 1e-10, 1 + 1e-10):
        assert torch.equal((upper * nudge).bfloat16().float(), table[32768:])


def test_rademacher_entries_are_the_signs_of_the_grid() -> None:
    signs = grid_signs(KEY, rows=(0, 3), columns=(0, 21), num_columns=21, device="cpu")
    assert torch.equal(draw("rademacher", rank=3, block=21), signs.double() * (1 / math.sqrt(3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "block"), [(4, 16), (3, 256), (7, 512)])
def test_a_slice_of_a_equals_the_slice_of_the_whole(kind: str, rank: int, block: int) -> None:
    whole = draw(kind, rank=rank, block=block, dtype=torch.float32)
    for first, stop in [(0, block), (0, 1), (block - 1, block), (3, 3), (3, 14), (5, block - 2)]:
        part = draw(kind, rank=rank, block=block, columns=(first, stop), dtype=torch.float32)
        assert part.shape == (rank, stop - first)
        assert torch.equal(part, whole[:, first:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_float32_and_float64_differ_by_the_rounding_of_the_scalar(kind: str) -> None:
    wide, narrow = draw(kind, rank=3), draw(kind, rank=3, dtype=torch.float32)
    assert narrow.dtype == torch.float32
    # Rounding of the scalar and of the product: two relative errors of 2^-24.
    assert ((narrow.double() - wide).abs() <= wide.abs() * 2.0**-23).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"name_key": 1},
        {"purpose": Purpose.GRADIENT},
        {"window": 1},
        {"matrix": 1},
    ],
)
def test_another_seed_name_purpose_window_or_matrix_is_another_draw(
    kind: str, change: dict[str, int]
) -> None:
    one = {"seed": 0, "name_key": 0, "purpose": Purpose.MOMENTUM, "window": 0, "matrix": 0}
    a, b = (draw(kind, key=derive_key(**{**one, **it}), block=64) for it in ({}, change))
    assert not torch.equal(a, b)


def test_an_unknown_kind_names_the_kinds() -> None:
    with pytest.raises(ValueError, match="hadamard, gaussian, rademacher; got 'sparse'"):
        draw("sparse")


def test_a_hadamard_block_must_be_a_power_of_two() -> None:
    with pytest.raises(ValueError, match=r"power of two; got block=1376\. Use such a block, or"):
        draw("hadamard", block=1376)


def test_a_hadamard_rank_must_not_exceed_its_block() -> None:
    with pytest.raises(ValueError, match=r"got rank=17, block=16\. Lower rank"):
        draw("hadamard", rank=17)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_below_one_is_an_error(kind: str) -> None:
    with pytest.raises(ValueError, match="at least 1; got rank=0, block=16"):
        draw(kind, rank=0)


@pytest.mark.parametrize("beta1", [-0.1, 1.0, math.nan])
def test_kappa_needs_a_beta_below_one(beta1: float) -> None:
    with pytest.raises(ValueError, match=r"beta1 must lie in \[0, 1\); got beta1="):
        matrices.smallest_stable_kappa("gaussian", rank=1, block=8, beta1=beta1)


@pytest.mark.parametrize(
    ("beta1", "answers"),
    [
        # ratio:  2   4   8   16   32  128, of `facts`: Gaussian, c = ratio
        (0.90, [6, 8, 11, 14, 17, 24]),
        (0.95, [11, 16, 22, 28, 35, 48]),
        (0.99, [55, 81, 110, 141, 174, 242]),
    ],
)
def test_the_smallest_stable_kappa_is_where_the_variance_stops_growing(
    beta1: float, answers: list[int]
) -> None:
    for ratio, kappa in zip([2, 4, 8, 16, 32, 128], answers, strict=True):
        rank = 1024
        got = matrices.smallest_stable_kappa("gaussian", rank=rank, block=ratio * rank, beta1=beta1)
        assert got == kappa
        growth = 1 + matrices.relative_noise("gaussian", rank=rank, block=ratio * rank)
        assert beta1 ** (2 * got) * growth <= 1 < beta1 ** (2 * got - 2) * growth


def test_kappa_is_at_least_one_step() -> None:
    assert matrices.smallest_stable_kappa("hadamard", rank=8, block=8, beta1=0.9) == 1
    assert matrices.smallest_stable_kappa("gaussian", rank=1, block=64, beta1=0.0) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_of_each_kind_is_frozen(kind: str) -> None:
    a = draw(kind, rank=2, block=4, dtype=torch.float32)
    assert a.tolist() == GOLDEN_A[kind]
    large = draw(kind, rank=8, block=256, dtype=torch.float32)
    assert hashlib.sha256(large.numpy().astype("<f4").tobytes()).hexdigest() == GOLDEN_HASH[kind]


GOLDEN_TABLE = "ff53200b304b317173412ab5d40de8f0b5223003e4cc32fa194e91c001084bf9"
GOLDEN_VARIANCE = 0.9999856527186245
GOLDEN_A = {
    "hadamard": [
        [0.7071067690849304, 0.7071067690849304, -0.7071067690849304, 0.7071067690849304],
        [0.7071067690849304, 0.7071067690849304, 0.7071067690849304, -0.7071067690849304],
    ],
    "gaussian": [
        [-0.7844521999359131, 0.41156119108200073, 0.348031610250473, 0.5275717377662659],
        [-0.994376003742218, 0.32869651913642883, -1.143532395362854, -0.32869651913642883],
    ],
    "rademacher": [
        [0.7071067690849304, -0.7071067690849304, -0.7071067690849304, -0.7071067690849304],
        [-0.7071067690849304, -0.7071067690849304, -0.7071067690849304, -0.7071067690849304],
    ],
}
GOLDEN_HASH = {
    "hadamard": "60a12efc2a3e6e7e94acf320c4089e471178dd5db368424ca49856887b4dd20f",
    "gaussian": "1ae150e68b4a7ef00bc3b5f0e82025391b5323d4aee7f623c4f539922034a076",
    "rademacher": "50beb34f8095ed26aa5dcf54c170d8941c2a9614bb7f6a12711633802892843c",
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_gives_the_a_of_the_cpu(kind: str) -> None:
    where = {"key": KEY, "rank": 5, "block": 512, "columns": (3, 401), "dtype": torch.float32}
    on_gpu = sketch_matrix(kind, **where, device="cuda")
    assert torch.equal(on_gpu.cpu(), sketch_matrix(kind, **where, device="cpu"))
