# SPDX-License-Identifier: Apache-2.0
"""A batch cut into pieces small enough that a step's temporaries stay small.

A piece is some rows of one large parameter, or several small parameters whole. Cut once, when a
step is planned. Shape suffixes: E matrices, N rows, W columns of the piece, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from flora_dist.core.state.spec import Geometry
from flora_dist.core.step.basis import Place
from flora_dist.core.step.batch import Batch, Member
from flora_dist.core.step.cut_blocks import Edge, edges_of
from flora_dist.core.step.views import (
    as_batches,
    carve,
    inside,
    joined,
    momentum_batches,
    work_limit,
)
from flora_dist.core.tiles import Tile, split


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """Some rows of one parameter, or several parameters whole, as views of their tensors."""

    tile: Tile
    """What of each member it is."""
    source: int
    """Which of the member's tiles ``tile`` is cut from."""
    window: tuple[slice, slice]
    """Matrices and rows of ``tile`` within that one."""
    sizes: tuple[int, int, int]
    """E, N, W, of all members together."""
    members: slice
    place: Place
    """Its matrices among those of the batch that are here, and its columns."""
    summed: slice
    """Its matrices among those of the batch that are summed over ranks."""
    cut_rows: slice | None
    """Places of its rows among the cut ones; None: its rows are whole."""
    edges: tuple[Edge, ...]
    """Its blocks of which other ranks hold pieces."""
    weights: tuple[Tensor, ...]
    """(E, N, W) of each member."""
    momenta: tuple[Tensor, ...]
    """(E, N, blocks touched, R or a record's bytes) of each, or (E, N, W) where dense; empty
    without momentum."""
    rows: tuple[Tensor, ...]
    """R, (E, N) of each."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Views:
    """A tile of some members, and their tensors' views of it."""

    tile: Tile
    source: int
    window: tuple[slice, slice]
    weights: tuple[Tensor, ...]
    momenta: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]


class Pieces:
    """The pieces of a batch, from step to step.

    Channels-last convolutions are no matrices where they lie: they are copied there and back.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        weights = self._weights()
        self._is_copied = any(
            own and own[0].data_ptr() != member.weight.data_ptr()
            for own, member in zip(weights, batch.members, strict=True)
        )
        self._pieces = build_pieces(batch, weights)

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    def refresh(self) -> None:
        """Copy anew what is copied."""
        if self._is_copied:
            self._pieces = build_pieces(self._batch, self._weights())

    def write_back_(self) -> None:
        """Weights from their copies, whose memory is given back."""
        if not self._is_copied:
            return
        (member,) = self._batch.members
        written = joined([w.flatten(0, 1) for piece in self._pieces for w in piece.weights])
        member.weight.copy_(written.view(member.weight.shape))
        self._pieces = []

    def _weights(self) -> list[list[Tensor]]:
        shape = self._batch.geometry.shape
        return [as_batches(m.weight, m.tiles, shape=shape) for m in self._batch.members]


def build_pieces(batch: Batch, weights: Sequence[Sequence[Tensor]]) -> list[Piece]:
    """Cut a batch; ``weights`` are the tiles of each member's, as ``as_batches`` gave them."""
    limit = work_limit(batch.device)
    size, members = batch.geometry, batch.members
    wholes = [_wholes(m, own, size) for m, own in zip(members, weights, strict=True)]
    per_member = sum(tile.num_elements for tile in members[0].tiles)
    if len(members) == 1 or per_member > limit:
        return [
            _cut(batch, whole, tile, index)
            for index, own in enumerate(wholes)
            for whole in own
            for tile in _cut_tile(whole.tile, batch, limit)
        ]
    together = max(1, limit // max(1, per_member))
    firsts = [own[0] for own in wholes if own]
    return [
        _stack(batch, firsts[start : start + together], start)
        for start in range(0, len(firsts), together)
    ]


def _wholes(member: Member, weights: Sequence[Tensor], size: Geometry) -> list[_Views]:
    """Each tile of a member."""
    tiles = member.tiles
    momenta: Sequence[tuple[Tensor, ...]] = [()] * len(tiles)
    if "momentum" in member.local:
        momenta = [(m,) for m in momentum_batches(member.local["momentum"], tiles, size)]
    rows = carve(member.local["row"], [tile.sizes[:2] for tile in tiles])
    everything = slice(None), slice(None)
    return [
        _Views(
            tile=tile,
            source=source,
            window=everything,
            weights=(weight,),
            momenta=momentum,
            rows=(row,),
        )
        for source, (tile, weight, momentum, row) in enumerate(
            zip(tiles, weights, momenta, rows, strict=True)
        )
    ]


def _cut(batch: Batch, whole: _Views, tile: Tile, member: int) -> Piece:
    """Some rows of one member's tile."""
    window = inside(whole.tile, tile)
    views = replace(
        whole,
        tile=tile,
        window=window,
        weights=tuple(weight[window] for weight in whole.weights),
        momenta=tuple(momentum[window] for momentum in whole.momenta),
        rows=tuple(row[window] for row in whole.rows),
    )
    start = member * batch.matrices_here - batch.members[0].matrices[0]
    first, last = (start + matrix for matrix in tile.matrices)
    return _piece(batch, views, slice(member, member + 1), slice(first, last))


def _stack(batch: Batch, wholes: Sequence[_Views], first: int) -> Piece:
    """Several members whole, one after the other along E."""
    last, each = first + len(wholes), batch.matrices_here
    views = replace(
        wholes[0],
        weights=tuple(weight for whole in wholes for weight in whole.weights),
        momenta=tuple(momentum for whole in wholes for momentum in whole.momenta),
        rows=tuple(row for whole in wholes for row in whole.rows),
    )
    return _piece(batch, views, slice(first, last), slice(first * each, last * each))


def _piece(batch: Batch, views: _Views, members: slice, here: slice) -> Piece:
    tile, size, cuts = views.tile, batch.geometry, batch.members[0].cuts
    cut_rows: slice | None = None
    edges: tuple[Edge, ...] = ()
    if tile.columns != (0, size.num_columns):
        start = cuts.row_slot(tile.matrices[0] * size.num_rows + tile.rows[0])
        cut_rows = slice(start, start + tile.sizes[1])
        edges = edges_of(tile, size, cuts)
    matrices, num_rows, columns = tile.sizes
    held = batch.held.start
    return Piece(
        tile=tile,
        source=views.source,
        window=views.window,
        sizes=(matrices * len(views.rows), num_rows, columns),
        members=members,
        place=Place(matrices=here, columns=tile.columns),
        summed=slice(here.start + held, here.stop + held),
        cut_rows=cut_rows,
        edges=edges,
        weights=views.weights,
        momenta=views.momenta,
        rows=views.rows,
    )


def _cut_tile(tile: Tile, batch: Batch, limit: int) -> Iterator[Tile]:
    """Cut a tile into smaller ones; where its rows are cut, each stays inside one matrix."""
    unit = batch.config.orthogonalise or 1
    if tile.columns == (0, batch.geometry.num_columns):
        yield from split(tile, max_elements=limit, unit=unit)
        return
    for matrix in range(*tile.matrices):
        single = Tile(matrices=(matrix, matrix + 1), rows=tile.rows, columns=tile.columns)
        yield from split(single, max_elements=limit, unit=unit)
