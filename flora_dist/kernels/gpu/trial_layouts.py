# SPDX-License-Identifier: Apache-2.0
"""Layouts of the parameters that a self-check tries, of which there are no other ranks.

A batch of which several ranks hold pieces is tried as such: a span of a flat tensor that begins and
ends inside of rows and blocks, or some columns of every row. Other ranks are taken to add a quarter
of what this one sends, so that what is summed differs from what is here.

Shape suffixes: E matrices, N rows, M columns, S numbers of a message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flora_dist.core.layouts.flat import FlatLayout, Span
from flora_dist.core.layouts.replicated import ReplicatedLayout
from flora_dist.core.protocols import Layout, Part
from flora_dist.core.state.spec import StateTensor, grid_of, matrix_sizes
from flora_dist.core.tiles import Cuts, Interval, Tile, find_cuts, tiles_of_span

WHOLE, SPAN, COLUMNS = "whole", "span", "columns"
"""What of a parameter is here."""
NAME = "self-check"
_SHARE = 0.25


@dataclass(frozen=True)
class Echo:
    """A reducer whose other ranks hold a quarter of what this one sends."""

    rank: int

    def sum_(self, message_S: Tensor) -> None:
        """A quarter is added."""
        message_S *= 1 + _SHARE

    def exchange(self, sent_S: Tensor, sizes: Mapping[int, int]) -> Tensor:
        """Peers give as much."""
        del sizes
        return _SHARE * sent_S


@dataclass(frozen=True, eq=False)
class ColumnsPart:
    """``Part`` of some columns of all matrices, as under tensor parallelism."""

    tensor: Tensor
    name: str
    shape: tuple[int, ...]
    owned: tuple[Interval, ...]
    """Each rank's columns."""
    reducer: Echo
    trains: bool = True
    splits_matrices: bool = True

    @property
    def matrices(self) -> Interval:
        """All."""
        return 0, matrix_sizes(self.shape)[0]

    @property
    def column_shards(self) -> int:
        """As many as ranks."""
        return len(self.owned)

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """One."""
        return (self._tile(self.owned[self.reducer.rank]),)

    def _tile(self, columns: Interval) -> Tile:
        matrices, rows, _ = matrix_sizes(self.shape)
        return Tile(matrices=(0, matrices), rows=(0, rows), columns=columns)

    def cuts(self, block: int) -> Cuts:
        """Every row, and blocks between two ranks."""
        return find_cuts(map(self._tile, self.owned), grid_of(self.shape, block))

    def weight(self) -> Tensor:
        """The columns that are here."""
        return self.tensor.detach()

    def address(self) -> int:
        """Of the weight."""
        return self.tensor.data_ptr()

    def gradient(self) -> Tensor | None:
        """Of these columns."""
        return self.tensor.grad

    def local_state_shape(self, entry: StateTensor) -> tuple[int, ...]:
        """A momentum of these columns, or of the blocks that they touch; all else is whole."""
        if entry.name != "momentum":
            return entry.shape
        (tile,) = self.tiles
        if entry.along == "elements":
            return (*entry.shape[:-1], tile.sizes[2])
        first, last = tile.blocks(entry.block)
        return (*entry.shape[:-2], last - first, entry.shape[-1])

    def allocate(self, entry: StateTensor, dtype: torch.dtype) -> Tensor:
        """Zeros."""
        shape = self.local_state_shape(entry)
        return torch.zeros(shape, dtype=dtype, device=self.tensor.device)

    def local(self, state: Tensor) -> Tensor:
        """The same."""
        return state


class ColumnsLayout:
    """Knows shards of columns by identity."""

    def __init__(self, parts: Iterable[ColumnsPart]) -> None:
        self._parts = {id(part.tensor): part for part in parts}

    def claims(self, tensor: Tensor) -> bool:
        """Whether it is one of them."""
        return id(tensor) in self._parts

    def parts(self, tensor: Tensor, name: str) -> tuple[Part, ...]:
        """The shard."""
        del name
        return (self._parts[id(tensor)],)

    def state_of(self, state: dict[str, Any], part: Part) -> dict[str, Any]:
        """The tensor's own."""
        del part
        return state


def tiles_held(cut: str, shape: tuple[int, ...]) -> tuple[Tile, ...]:
    """What of a parameter is here; boundaries stand inside of rows and blocks."""
    matrices, rows, columns = matrix_sizes(shape)
    if cut == SPAN:
        return tiles_of_span(*_spans(shape)[1], num_rows=rows, num_columns=columns)
    width = _shards(shape)[0] if cut == COLUMNS else (0, columns)
    return (Tile(matrices=(0, matrices), rows=(0, rows), columns=width),)


def held(whole_ENM: Tensor, tiles: Iterable[Tile]) -> Tensor:
    """A copy of the elements of tiles, one tile after the other."""
    slices = [(slice(*t.matrices), slice(*t.rows), slice(*t.columns)) for t in tiles]
    return torch.cat([whole_ENM[each].reshape(-1) for each in slices])


def local_shape(cut: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the tensor that holds what is here."""
    if cut == WHOLE:
        return shape
    tiles = tiles_held(cut, shape)
    if cut == COLUMNS:
        return tiles[0].sizes[-len(shape) :]
    return (sum(tile.num_elements for tile in tiles),)


def layout_of(cut: str, weight: Tensor, shape: tuple[int, ...]) -> Layout:
    """How ``weight`` holds its part of a parameter of this shape."""
    if cut == WHOLE:
        return ReplicatedLayout()
    if cut == COLUMNS:
        return ColumnsLayout([ColumnsPart(weight, NAME, shape, _shards(shape), Echo(0))])
    layout = FlatLayout()
    span = Span(name=NAME, shape=shape, owned=_spans(shape), offset=0)
    layout.add_view(weight, span, rank=1, reducer=Echo(1))
    return layout


def _spans(shape: tuple[int, ...]) -> tuple[Interval, ...]:
    """Of three ranks."""
    matrices, rows, columns = matrix_sizes(shape)
    third = matrices * rows // 3 * columns
    first = third + columns // 2
    last = first + third + max(1, columns // 3)
    return (0, first), (first, last), (last, matrices * rows * columns)


def _shards(shape: tuple[int, ...]) -> tuple[Interval, ...]:
    """Of two ranks."""
    columns = shape[-1]
    middle = max(1, columns // 2 - 1)  # between blocks, half of most rows would be
    return (0, middle), (middle, columns)
