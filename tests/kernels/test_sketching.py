# SPDX-License-Identifier: Apache-2.0
"""Sketches of gradients and random bits by the compiled kernels are those of torch's operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flora_dist.core.sketch.matrices import entry_scale, sketch_matrices
from flora_dist.core.sketch.philox import Counters, Stream, drawn_by_torch
from flora_dist.kernels.random_bits import drawn
from flora_dist.kernels.sketching import RowSketch, add_sketched_
from tests.kernels.paths import path

CPU = torch.device("cpu")
# Keys and counters whose upper halves matter, rows that are no multiple of any vector.
GRIDS = [
    Counters(keys=(1,), first=0, count=1, stream=Stream.INTEGERS),
    Counters(keys=((1 << 64) - 3, 5), first=0, count=67, stream=Stream.SIGNS),
    Counters(keys=(3 << 40,), first=(1 << 33) - 9, count=20, stream=Stream.ROW_DRAWS),
    Counters(keys=(7, 1 << 63), first=11, count=13, rows=5, stride=1000, stream=Stream.INTEGERS),
    Counters(keys=(2,), first=3, count=5000, rows=2, stride=5000, stream=Stream.INTEGERS),
]
# Experts, cut blocks at both ends, a rank that no vector has, whole blocks of a fast product.
SHAPES = [((2, 5, 40), 16, 8, 3), ((1, 9, 70), 64, 60, 8), ((1, 300, 256), 64, 0, 8)]


@pytest.mark.parametrize("counters", GRIDS, ids=str)
def test_random_words_have_the_bits_of_torchs_operators(counters: Counters) -> None:
    assert torch.equal(drawn(counters, CPU), drawn_by_torch(counters, CPU))


def test_random_words_follow_the_chosen_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flora_dist.kernels.random_bits.drawn_by_torch", _nothing)
    with path("torch"):
        assert drawn(GRIDS[0], CPU) is NOTHING
    with path("native"):
        assert drawn(GRIDS[0], CPU) is not NOTHING


@pytest.mark.parametrize("law", ["hadamard", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "block", "first", "rank"), SHAPES)
def test_a_sketched_sum_is_that_of_torchs_operators(
    shape: tuple[int, int, int],
    block: int,
    first: int,
    rank: int,
    dtype: torch.dtype,
    law: str,
) -> None:
    expected, own = (sums(name, shape, block, first, rank, dtype, law) for name in PATHS)
    # Each number is a sum of a block's products, added in another order.
    assert (own - expected).norm() < 1e-6 * expected.norm()


def test_a_sketched_sum_does_not_depend_on_the_number_of_threads() -> None:
    before, shape = torch.get_num_threads(), (3, 200, 300)
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(sums("native", shape, 64, 0, 8, torch.float32, "hadamard"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


NOTHING = torch.zeros(0)
PATHS = ("torch", "native")


def _nothing(*given: object) -> Tensor:
    del given
    return NOTHING


def sums(
    name: str,
    shape: tuple[int, int, int],
    block: int,
    first: int,
    rank: int,
    dtype: torch.dtype,
    law: str,
) -> Tensor:
    """C after two gradients, by a path."""
    generator = torch.Generator().manual_seed(0)
    matrices, rows, width = shape
    blocks = -(-(first + width) // block) - first // block
    kept = torch.zeros(matrices, rows, blocks, rank)
    sketch = sketch_matrices(
        law, keys=range(matrices), rank=rank, block=block, dtype=torch.float32, device="cpu"
    )
    row_sketch = RowSketch(
        matrices_ERB=sketch,
        first_column=first,
        is_hadamard=law == "hadamard",
        scale=entry_scale(law, rank=rank),
    )
    for _ in range(2):
        gradient = torch.randn(shape, generator=generator).to(dtype)
        with path(name):
            add_sketched_(kept, gradient, row_sketch)
    return kept
