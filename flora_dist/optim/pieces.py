# SPDX-License-Identifier: Apache-2.0
"""A batch cut into pieces small enough that a step's temporaries stay small.

A piece is some rows of one large parameter, or several small parameters whole. Cut once, when a
step is planned. Shape suffixes: E matrices, N rows, W columns of the piece, R rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flora_dist.optim.basis import Place
from flora_dist.optim.batch import Batch, Member, Moment
from flora_dist.optim.gradient import SketchedGradient
from flora_dist.optim.spec import Geometry, is_batch
from flora_dist.sketch import ops
from flora_dist.tiles import Tile, split

# Elements per piece. On a CPU a piece of fp32 stays in the second-level cache through the ten or
# so passes of a step; on a GPU a piece must be large enough to fill the device.
CPU_ELEMENTS = 1 << 17
GPU_ELEMENTS = 1 << 25


def work_limit(device: torch.device) -> int:
    """Elements of a piece on this device."""
    return CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """Some rows of one parameter, or several parameters whole, as views of their tensors."""

    tile: Tile
    """What of each member it is."""
    source: int
    """Which of the member's tiles ``tile`` is cut from."""
    window: tuple[slice, slice]
    """Matrices and rows of ``tile`` within that one."""
    members: slice
    place: Place
    """Its matrices among those of the batch that are here, and its columns."""
    weights: tuple[Tensor, ...]
    """(E, N, W) of each member."""
    momenta: tuple[Tensor, ...]
    """(E, N, blocks touched, R) of each, or (E, N, W) where dense; empty without momentum."""
    rows: tuple[Tensor, ...]
    """R, (E, N) of each."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, N, W, of all members together."""
        matrices, rows, columns = self.tile.sizes
        return matrices * len(self.rows), rows, columns


def build_pieces(batch: Batch, weights: Sequence[Sequence[Tensor]]) -> list[Piece]:
    """Cut a batch; ``weights`` are the tiles of each member's, as ``as_batches`` gave them."""
    limit = work_limit(batch.device)
    size, each = batch.geometry, batch.matrices_here
    views = [_views(m, own, size) for m, own in zip(batch.members, weights, strict=True)]
    per_member = sum(tile.num_elements for tile in batch.part.tiles)
    if len(views) == 1 or per_member > limit:
        found: list[Piece] = []
        for index, of_tiles in enumerate(views):
            start = index * each - batch.part.matrices[0]
            for source, whole in enumerate(of_tiles):
                whole = replace(whole, source=source, members=slice(index, index + 1))
                tiles = _cut_tile(whole.tile, num_columns=size.num_columns, limit=limit)
                found.extend(_cut(whole, tile, start) for tile in tiles)
        return found
    together = max(1, limit // max(1, per_member))
    firsts = [of_tiles[0] for of_tiles in views if of_tiles]
    return [
        _stack(firsts[start : start + together], start, each)
        for start in range(0, len(firsts), together)
    ]


def _views(member: Member, weights: Sequence[Tensor], size: Geometry) -> list[Piece]:
    """One piece for each whole tile of a member."""
    tiles = member.tiles
    momenta: Sequence[tuple[Tensor, ...]] = [()] * len(tiles)
    if "momentum" in member.local:
        momenta = [(m,) for m in momentum_batches(member.local["momentum"], tiles, size)]
    rows = carve(member.local["row"], [tile.sizes[:2] for tile in tiles])
    everything = slice(None), slice(None)
    return [
        Piece(
            tile=tile,
            source=0,
            window=everything,
            members=slice(0, 1),
            place=Place(matrices=slice(*tile.matrices), columns=tile.columns),
            weights=(weight,),
            momenta=momentum,
            rows=(row,),
        )
        for tile, weight, momentum, row in zip(tiles, weights, momenta, rows, strict=True)
    ]


def _cut(whole: Piece, tile: Tile, start: int) -> Piece:
    """Some rows of a whole tile, whose member's matrices begin at ``start`` of the batch."""
    window = inside(whole.tile, tile)
    first, last = (start + matrix for matrix in tile.matrices)
    return replace(
        whole,
        tile=tile,
        window=window,
        place=Place(matrices=slice(first, last), columns=tile.columns),
        weights=tuple(weight[window] for weight in whole.weights),
        momenta=tuple(momentum[window] for momentum in whole.momenta),
        rows=tuple(row[window] for row in whole.rows),
    )


def _stack(wholes: Sequence[Piece], first: int, each: int) -> Piece:
    """Several members whole, one after the other along E."""
    last = first + len(wholes)
    return replace(
        wholes[0],
        members=slice(first, last),
        place=replace(wholes[0].place, matrices=slice(first * each, last * each)),
        weights=tuple(weight for one in wholes for weight in one.weights),
        momenta=tuple(momentum for one in wholes for momentum in one.momenta),
        rows=tuple(row for one in wholes for row in one.rows),
    )


def read_gradient(batch: Batch, now: Moment, piece: Piece) -> Tensor:
    """The gradient of a piece (E, N, W), contiguous, in the arithmetic's dtype, times the sign.

    It may share the gradient's memory: nothing in it may be changed.
    """
    found = now.gradients[piece.members]
    dense = [each for each in found if isinstance(each, Tensor)]
    sketched = [each for each in found if isinstance(each, SketchedGradient)]
    if sketched:
        elements_ENW = _expand(sketched, piece)
    elif not dense:
        elements_ENW = torch.zeros(piece.sizes, dtype=batch.dtype, device=batch.device)
    elif len(dense) == 1:
        tiles = batch.members[piece.members.start].tiles
        of_tiles = as_batches(dense[0], tiles, shape=batch.geometry.shape)
        elements_ENW = of_tiles[piece.source][piece.window]
    else:
        elements_ENW = torch.stack(dense).view(piece.sizes)
    elements_ENW = elements_ENW.to(batch.dtype).contiguous()
    return elements_ENW if batch.sign > 0 else -elements_ENW


def _expand(found: Sequence[SketchedGradient], piece: Piece) -> Tensor:
    # G' = C A
    first, last = piece.tile.matrices
    compressed = [each.tiles[piece.source][piece.window] for each in found]
    sketches = [
        each.sketch_ERB[first - each.first_matrix : last - each.first_matrix] for each in found
    ]
    return ops.expand(
        compressed[0] if len(found) == 1 else torch.cat(compressed),
        sketches[0] if len(found) == 1 else torch.cat(sketches),
        num_columns=piece.sizes[2],
        first_column=piece.tile.columns[0],
    )


def as_batches(local: Tensor, tiles: Sequence[Tile], *, shape: tuple[int, ...]) -> list[Tensor]:
    """View a part's local elements as one (E, N, W) batch per tile; a copy where none is possible.

    A single tile keeps its strides; several tiles follow each other in a flat tensor. ``shape`` is
    that of the whole parameter.
    """
    if len(tiles) == 1 and local.ndim >= 2:
        return [local if is_batch(shape) else local.flatten(1).unsqueeze(0)]
    return carve(local, [tile.sizes for tile in tiles])


def carve(local: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Views of consecutive stretches of a tensor's elements, one per shape."""
    flat = local.reshape(-1)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    ends = itertools.accumulate(sizes)
    return [
        flat[end - size : end].view(shape)
        for shape, size, end in zip(shapes, sizes, ends, strict=True)
    ]


def _cut_tile(tile: Tile, *, num_columns: int, limit: int) -> Iterator[Tile]:
    """Cut a tile into smaller ones; where its rows are cut, each stays inside one matrix."""
    if tile.columns == (0, num_columns):
        yield from split(tile, max_elements=limit)
        return
    for matrix in range(*tile.matrices):
        single = Tile(matrices=(matrix, matrix + 1), rows=tile.rows, columns=tile.columns)
        yield from split(single, max_elements=limit)


def inside(tile: Tile, piece: Tile) -> tuple[slice, slice]:
    """The matrices and rows of ``piece``, counted within ``tile``."""
    matrices = slice(piece.matrices[0] - tile.matrices[0], piece.matrices[1] - tile.matrices[0])
    rows = slice(piece.rows[0] - tile.rows[0], piece.rows[1] - tile.rows[0])
    return matrices, rows


def momentum_batches(local: Tensor, tiles: Sequence[Tile], size: Geometry) -> list[Tensor]:
    """The momentum of each tile: (E, N, blocks touched, R), or (E, N, W) where dense."""
    if size.rank is None:
        return as_batches(local, tiles, shape=size.shape)
    touched = [last - first for first, last in (tile.blocks(size.block) for tile in tiles)]
    if len(tiles) == 1:  # a rank may have places for more blocks than it touches
        batch = local.view(*tiles[0].sizes[:2], -1, size.rank)
        return [batch[:, :, : touched[0]]]
    shapes = [(*t.sizes[:2], k, size.rank) for t, k in zip(tiles, touched, strict=True)]
    return carve(local, shapes)
