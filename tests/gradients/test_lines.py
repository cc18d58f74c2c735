# SPDX-License-Identifier: Apache-2.0
"""What is sent of sketches: every rank's line holds what that rank keeps, however it is packed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from flora_dist import Flora
from flora_dist.core.layouts.dtensor import TilesAlong, tiles_at
from flora_dist.core.layouts.replicated import whole
from flora_dist.core.tiles import Tile
from flora_dist.gradients.accumulator import Accumulator
from flora_dist.gradients.average_lines import EvenLines, OwnLines, lines_of
from flora_dist.gradients.flow import Source, flow_for, geometry_for
from flora_dist.gradients.request import SketchRequest
from flora_dist.gradients.route import Route
from tests.conftest import pool_of

SHAPES = {"even": (6, 16), "ragged": (7, 16), "short": (1, 16), "experts": (5, 3, 16)}
RANKS = 3
BUCKET = 5


@dataclass
class OneOf:
    """A route as one rank of a group has it, without the group."""

    kept: list[tuple[Tile, ...]]
    rank: int
    scatter: Any = "a group"


def pieces(shape: tuple[int, ...]) -> list[tuple[Tile, ...]]:
    """As torch.chunk cuts the first dimension."""
    (tile,) = whole(shape)
    first, size = shape[0], -(-shape[0] // RANKS)
    found: list[tuple[Tile, ...]] = []
    for rank in range(RANKS):
        cut = (min(first, rank * size), min(first, (rank + 1) * size))
        if cut[0] == cut[1]:
            found.append(())
        elif len(shape) == 3:
            found.append((replace(tile, matrices=cut),))
        else:
            found.append((replace(tile, rows=cut),))
    return found


def accumulators() -> list[Accumulator]:
    """One of each shape that has taken a gradient, but for the last."""
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    optimizer = Flora(parameters.items(), rank=2, block=8)
    request, found = SketchRequest(gradients="compressed"), []
    for slot in optimizer.slots():
        tiles = whole(slot.part.shape)
        route = Route(kept=(tiles,))
        source = Source(tensor=slot.tensor, visible=slot.tensor, tiles=tiles, route=route)
        found.append(flow_for(slot, source, geometry_for(slot, request), optimizer).accumulator)
        found[-1].add_(torch.randn(slot.part.shape))
    found[-2].drop()
    return found


@pytest.mark.parametrize("kind", [EvenLines, OwnLines])
def test_every_line_holds_what_its_rank_keeps(kind: Any) -> None:
    torch.manual_seed(0)
    own = accumulators()
    packed: list[Tensor] = []
    for rank in range(RANKS):
        routes: Any = [OneOf(pieces(shape), rank) for shape in SHAPES.values()]
        assert isinstance(lines_of(own, routes), EvenLines)
        lines = kind(own, routes)
        buckets = []
        for start in range(0, lines.length, BUCKET):
            width = min(BUCKET, lines.length - start)
            buckets.append(torch.zeros(RANKS, width))
            lines.pack_(buckets[-1], start)
        packed.append(torch.cat(buckets, dim=1))
        for run in lines.mine:
            kept = own[run.index].at(run.share).reshape(-1)
            assert torch.equal(packed[-1][rank, run.begin : run.stop], kept)
        assert sum(run.share.size for run in lines.mine) == sum(
            own[index].share_of(tile).size
            for index, route in enumerate(routes)
            for tile in route.kept[rank]
        )
    assert all(torch.equal(each, packed[0]) for each in packed)


def test_even_pieces_are_no_longer_than_lines_of_their_own() -> None:
    own = accumulators()
    routes: Any = [OneOf(pieces(shape), 1) for shape in SHAPES.values()]
    assert EvenLines(own, routes).length == OwnLines(own, routes).length


def test_ranks_that_keep_other_pieces_have_lines_of_their_own() -> None:
    own = accumulators()
    routes: Any = [OneOf(pieces(shape), 0) for shape in SHAPES.values()]
    routes[1].kept = routes[1].kept[::-1]
    assert isinstance(lines_of(own, routes), OwnLines)


def tiles_of_all() -> list[tuple[Any, Any]]:
    """For each tensor, the tiles of every rank as this one finds them, and its own."""
    mesh, found = init_device_mesh("cpu", (2,)), []
    for shape, dim in (((5, 8), 0), ((1, 8), 0), ((3, 4, 8), 0), ((4, 5), 1)):
        sharded = distribute_tensor(torch.zeros(shape), mesh, [Shard(dim)])
        found.append((list(TilesAlong(sharded, 0)), tiles_at(sharded)))
    return found


@pytest.mark.ranks(2)
def test_every_rank_knows_the_tiles_of_all() -> None:
    ranks = pool_of(2)(tiles_of_all)
    for everyone, other in zip(*ranks, strict=True):
        assert everyone[0] == other[0] == [everyone[1], other[1]]
