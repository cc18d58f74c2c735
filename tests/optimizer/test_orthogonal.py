# SPDX-License-Identifier: Apache-2.0
"""``orthogonalise``: what it makes of an update, on shards too, and where it is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from flora_dist import Flora
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import geometry_of
from flora_dist.core.step import pieces
from flora_dist.core.step.orthogonal import check_tiles, newton_schulz, orthogonalised
from flora_dist.core.tiles import Tile, split
from tests.battery.oracle import Case, distances, reference_of
from tests.conftest import pool_of
from tests.optimizer import runs

STEPS, SIDE = 4, 4


# By compiled kernels: what small singular values are rounded by grows 119-fold at most.
EXACT, FLOAT = 1e-11, 1e-4


def _distance(
    shapes: dict[str, tuple[int, ...]] = runs.SHAPES,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> float:
    weights = runs.build(shapes, dtype)
    start, settings = runs.values(weights), {**runs.SETTINGS, **settings}
    optimizer = Flora(weights.items(), **settings)
    oracle = reference_of(Case(dtype=dtype, settings=settings), start)
    for step in range(STEPS):
        runs.set_gradients(weights, step)
        oracle.step({name: weight.grad for name, weight in weights.items()})
        optimizer.step()
    return distances(start, dict(oracle.weights), runs.values(weights))[1]


@pytest.mark.parametrize("momentum", ["blend", "flora", "flora_strict", "none"])
def test_steps_with_tiles_are_the_reference(momentum: str) -> None:
    assert _distance(momentum=momentum, orthogonalise=SIDE) < EXACT
    assert _distance(dtype=torch.float32, momentum=momentum, orthogonalise=SIDE) < FLOAT


def test_each_tile_keeps_its_size_and_has_singular_values_alike() -> None:
    torch.manual_seed(0)
    # Columns of sizes from 1 to 100: singular values a hundredfold apart.
    update = torch.randn(2, 40, 48, dtype=torch.float64) * torch.logspace(0, 2, 48).double()
    got = orthogonalised(update, 16)
    for rows in (slice(0, 16), slice(16, 32), slice(32, 40)):
        for columns in (slice(0, 16), slice(16, 32), slice(32, 48)):
            before, after = update[:, rows, columns], got[:, rows, columns]
            torch.testing.assert_close(after.norm(dim=(1, 2)), before.norm(dim=(1, 2)))
            left, _, right = torch.linalg.svd(after)
            alike = torch.linalg.svdvals(after)
            assert (alike.quantile(0.2, dim=1) > 0.35 / 1.65 * alike.amax(1)).all()
            # The directions are those of the tile: its own values come back in their order.
            own = (left.mT @ before @ right.mT).diagonal(dim1=1, dim2=2)
            assert (
                (left.mT @ before @ right.mT).norm(dim=(1, 2)) - own.norm(dim=1)
            ).abs().max() < 1e-9


@pytest.mark.parametrize("shape", [(16, 16), (16, 5), (5, 16)])
def test_singular_values_of_three_thousandths_and_more_end_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    short = min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, short, dtype=torch.float64))[0] for n in shape)
    values = torch.logspace(-4, 0, short, dtype=torch.float64)
    got = newton_schulz((left * values @ right.mT).unsqueeze(0))[0]
    ends = (left.mT @ got @ right).diagonal()
    bound = values.pow(4).sum() ** 0.25  # |Y Y^T|^(1/2)
    torch.testing.assert_close(left * ends @ right.mT, got, rtol=0, atol=1e-9)
    near = values >= 0.003 * bound
    assert ((ends[near] >= 0.35) & (ends[near] <= 1.65)).all()
    assert 2 <= int(near.sum()) < short
    # 8.3837 x 4.0434 x 3.5056: what is smaller grows by that at most.
    assert (ends[~near] <= 118.9 * values[~near] / bound).all()
    assert (ends[~near] >= 0.5 * 118.9 * values[~near] / bound).all()


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        self.count += func in {torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 40, 90)])
def test_all_tiles_are_nine_batched_products_and_no_number_is_read(
    shape: tuple[int, ...],
) -> None:
    # A tensor of the device "meta" has no numbers: a step that waited for a GPU would raise here.
    update = torch.empty(shape, device="meta")
    with _Products() as products:
        assert orthogonalised(update, 16).shape == shape
    assert products.count == 9


def test_an_update_without_direction_stays_zero() -> None:
    zeros = torch.zeros(1, 6, 5)
    assert torch.equal(orthogonalised(zeros, 4), zeros)


def test_large_matrices_are_cut_between_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"large": (300, 40)}
    monkeypatch.setattr(pieces, "work_limit", lambda _: 50 * 40)
    assert _distance(shapes, orthogonalise=16) < 1e-11
    monkeypatch.setattr(
        pieces, "split", lambda tile, **cut: split(tile, max_elements=cut["max_elements"])
    )
    assert _distance(shapes, orthogonalise=16) > 1e-3


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)).double()


def _trained(model: nn.Module) -> dict[str, Tensor]:
    optimizer = Flora(model.named_parameters(), 0.1, rank=2, block=8, orthogonalise=SIDE)
    for step in range(STEPS):
        torch.manual_seed(step)
        model(torch.randn(6, 12, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {name: p.detach() for name, p in model.named_parameters()}
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in found.items()}


def _trained_on_shards() -> dict[str, Tensor]:
    model = fully_shard(_model(), mesh=init_device_mesh("cpu", (2,)))
    return _trained(model)


def test_shards_of_whole_tiles_train_the_run_of_one_process() -> None:
    expected = _trained(_model())
    for found in pool_of(2)(_trained_on_shards):
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-11)


@pytest.mark.parametrize(("rows", "refused"), [((0, 8), ""), ((8, 10), ""), ((0, 6), "0 to 6")])
def test_a_rank_with_a_piece_of_a_tile_is_refused(rows: tuple[int, int], refused: str) -> None:
    tile = Tile(matrices=(0, 1), rows=rows, columns=(0, 12))
    part: Any = SimpleNamespace(name="w", tiles=(tile,))
    size = geometry_of("w", (10, 12), FloraConfig(rank=None))
    if not refused:
        check_tiles(part, size, SIDE)
        return
    with pytest.raises(ValueError, match=rf"of 'w' this one has rows {refused} of 10"):
        check_tiles(part, size, SIDE)


@pytest.mark.parametrize("side", [1, 0, 2.5, "all"])
def test_a_side_that_is_none_is_refused(side: Any) -> None:
    with pytest.raises(ValueError, match="orthogonalise must be a whole number of at least 2"):
        Flora(runs.build().items(), orthogonalise=side)
