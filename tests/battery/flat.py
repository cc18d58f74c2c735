# SPDX-License-Identifier: Apache-2.0
"""A stand-in for ZeRO: all parameters in one line, each rank owning a span of it.

The optimizer sees one 1-D tensor per rank, as under DeepSpeed, and this layout tells it whose rows
and blocks the span cuts. Cuts are placed where they hurt: twice in one row, inside blocks, inside
an expert, and one rank owns nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from flora_dist.optim.part import Part
from flora_dist.optim.spec import StateTensor, matrix_sizes
from flora_dist.tiles import Cuts, Tile, find_cuts, tiles_of_span


@dataclass(frozen=True)
class WorldReducer:
    """Sums over all ranks, and counts."""

    def sum_(self, message_S: Tensor) -> None:
        dist.all_reduce(message_S)


@dataclass(frozen=True, eq=False)
class FlatPart:
    name: str
    shape: tuple[int, ...]
    flat: Tensor
    place: slice
    """Of this parameter's local elements in ``flat``."""
    tiles: tuple[Tile, ...]
    everyone: tuple[Tile, ...]
    reducer: WorldReducer = WorldReducer()

    splits_matrices: ClassVar[bool] = True

    @property
    def matrices(self) -> tuple[int, int]:
        return (self.tiles[0].matrices[0], self.tiles[-1].matrices[1]) if self.tiles else (0, 0)

    def cuts(self, block: int) -> Cuts:
        matrices, rows, columns = matrix_sizes(self.shape)
        sizes = {"num_matrices": matrices, "num_rows": rows, "num_columns": columns}
        return find_cuts(self.everyone, **sizes, block=block)

    def weight(self) -> Tensor:
        return self.flat.detach()[self.place]

    def gradient(self) -> Tensor | None:
        return None if self.flat.grad is None else self.flat.grad[self.place]

    def local_state_shape(self, entry: StateTensor) -> tuple[int, ...]:
        if entry.along == "elements":
            return (sum(t.num_elements for t in self.tiles),)
        held = self.tiles[-1].matrices[1] - self.tiles[0].matrices[0] if self.tiles else 0
        if entry.along == "columns":
            return (held, entry.shape[-1])
        entries = sum(t.num_blocks(entry.block) for t in self.tiles)
        return (entries,) if entry.name == "row" else (entries, entry.shape[-1])

    def allocate(self, entry: StateTensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.local_state_shape(entry), dtype=dtype)

    def local(self, state: Tensor) -> Tensor:
        return state


class FlatLayout:
    """Knows one flat tensor: the span ``bounds[rank]`` of the line of parameters."""

    def __init__(self, flat: Tensor, shapes: dict[str, tuple[int, ...]], bounds: list[int]) -> None:
        rank = dist.get_rank()
        spans = list(itertools.pairwise(bounds))
        self._flat, start, self._parts = flat, 0, []
        for name, shape in shapes.items():
            stop = start + torch.Size(shape).numel()
            _, rows, columns = matrix_sizes(shape)
            mine = [(max(a, start), min(b, stop)) for a, b in spans]
            tiles = [
                tiles_of_span(a - start, b - start, num_rows=rows, num_columns=columns)
                if a < b
                else ()
                for a, b in mine
            ]
            first, last = mine[rank]
            first, last = first - bounds[rank], max(first, last) - bounds[rank]
            everyone = tuple(t for each in tiles for t in each)
            part = FlatPart(name, shape, flat, slice(first, last), tiles[rank], everyone)
            self._parts.append(part)
            start = stop

    def claims(self, tensor: Tensor) -> bool:
        return tensor is self._flat

    def parts(self, tensor: Tensor, name: str) -> tuple[Part, ...]:
        del tensor, name
        return tuple(self._parts)

    def state_of(self, state: dict[str, Any], part: Part) -> dict[str, Any]:
        return state.setdefault(part.name, {})


def bounds_of(shapes: dict[str, tuple[int, ...]], world_size: int) -> list[int]:
    """Where the line is cut: rank r owns [bounds[r], bounds[r + 1])."""
    starts, total = {}, 0
    for name, shape in shapes.items():
        starts[name] = total
        total += torch.Size(shape).numel()
    up, experts = starts["up.weight"], starts["experts"]
    cuts = {
        1: [],
        2: [up + 45],
        3: [up + 45, up + 52],  # both in one row, both inside blocks
        4: [experts + 70, experts + 70, experts + 150],  # inside experts; rank 1 owns nothing
    }
    return [0, *cuts[world_size], total]
