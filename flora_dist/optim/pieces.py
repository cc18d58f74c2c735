# SPDX-License-Identifier: Apache-2.0
"""A part cut into pieces small enough that a step's temporaries stay small.

Shape suffixes: E matrices, N rows, W columns of the piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_dist.optim.gradient import DenseTile, GradientTile, SketchedGradient, sketched_tiles
from flora_dist.optim.job import Job
from flora_dist.optim.spec import Geometry, is_batch
from flora_dist.sketch.keys import Purpose
from flora_dist.tiles import Tile, split

# Elements per piece. On a CPU a piece of fp32 stays in the second-level cache through the ten or
# so passes of a step; on a GPU a piece must be large enough to fill the device.
CPU_ELEMENTS = 1 << 17
GPU_ELEMENTS = 1 << 25


def work_limit(device: torch.device) -> int:
    """Elements of a piece on this device."""
    return CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some rows of a matrix part, as views of its local tensors."""

    tile: Tile
    weight_ENW: Tensor
    gradient: GradientTile | None
    """None: this rank has no gradient; it counts as zero."""
    momentum: Tensor | None
    """(E, N, blocks touched, R), or (E, N, W) where dense; None without momentum."""
    row_EN: Tensor

    def read_gradient(self, dtype: torch.dtype, sign: float) -> Tensor:
        """The gradient (E, N, W), contiguous and in the arithmetic's dtype, times ``sign``."""
        if self.gradient is None:
            return torch.zeros(self.tile.sizes, dtype=dtype, device=self.weight_ENW.device)
        gradient_ENW = self.gradient.read(dtype)
        return gradient_ENW if sign > 0 else -gradient_ENW


def build_pieces(job: Job, weights: Sequence[Tensor]) -> list[Piece]:
    """Cut a matrix part; ``weights`` are its batches, as ``as_batches`` gave them."""
    tiles, size = job.part.tiles, job.geometry
    gradients = _gradients(job)
    momenta: list[Tensor | None] = [None] * len(tiles)
    if "momentum" in job.state:
        momenta = [*momentum_batches(job.local("momentum"), tiles, size)]
    rows = carve(job.local("row"), [tile.sizes[:2] for tile in tiles])
    return [
        Piece(
            tile=piece,
            weight_ENW=_window(weight, tile, piece),
            gradient=None if gradient is None else gradient.window(*inside(tile, piece)),
            momentum=None if momentum is None else _window(momentum, tile, piece),
            row_EN=_window(row, tile, piece),
        )
        for tile, weight, gradient, momentum, row in zip(
            tiles, weights, gradients, momenta, rows, strict=True
        )
        for piece in _cut_tile(tile, num_columns=size.num_columns, device=weight.device)
    ]


def _gradients(job: Job) -> Sequence[GradientTile | None]:
    """The gradient of each tile of a part."""
    tiles, gradient = job.part.tiles, job.gradient
    if gradient is None:
        return [None] * len(tiles)
    if isinstance(gradient, SketchedGradient):
        return sketched_tiles(gradient, tiles)
    batches = as_batches(gradient, tiles, shape=job.geometry.shape)
    return [DenseTile(elements_ENW=batch) for batch in batches]


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


def _cut_tile(tile: Tile, *, num_columns: int, device: torch.device) -> Iterator[Tile]:
    """Cut a tile into smaller ones; where its rows are cut, each stays inside one matrix."""
    limit = work_limit(device)
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


def _window(batch: Tensor, tile: Tile, piece: Tile) -> Tensor:
    """The matrices and rows of ``piece`` in a batch that stands for ``tile``."""
    return batch[inside(tile, piece)]


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


def write_weight_(job: Job, piece: Piece, step_ENW: Tensor) -> None:
    """W <- (1 - lr wd) W - step."""
    weight_ENW = piece.weight_ENW.to(step_ENW.dtype) * (1 - job.lr * job.weight_decay)
    weight_ENW -= step_ENW
    job.store.write_(
        piece.weight_ENW,
        weight_ENW,
        purpose=Purpose.ROUND_WEIGHT,
        tile=piece.tile,
        columns=piece.tile.columns,
        num_columns=job.geometry.num_columns,
    )


def write_momentum_(job: Job, piece: Piece, momentum: Tensor) -> None:
    """M <- momentum, in the dtype that it is kept in."""
    assert piece.momentum is not None
    size, tile = job.geometry, piece.tile
    columns, num_columns = tile.columns, size.num_columns
    if size.rank is not None:  # numbers of a row in order: rank of them per block
        first, last = tile.blocks(size.block)
        columns = (first * size.rank, last * size.rank)
        num_columns = size.blocks_per_row * size.rank
    job.store.write_(
        piece.momentum.flatten(2),
        momentum.flatten(2),
        purpose=Purpose.ROUND_MOMENTUM,
        tile=tile,
        columns=columns,
        num_columns=num_columns,
    )
