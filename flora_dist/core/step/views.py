# SPDX-License-Identifier: Apache-2.0
"""A part's flat local tensors, seen as batches of matrices, tile by tile.

Shape suffixes: E matrices, N rows, W columns of a tile, R rank of the sketch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from flora_dist.core.state.spec import Geometry, is_batch
from flora_dist.core.tiles import Tile

# Elements per piece. On a CPU a piece of fp32 stays in the second-level cache through the ten or
# so passes of a step; on a GPU a piece must be large enough to fill the device.
CPU_ELEMENTS = 1 << 17
GPU_ELEMENTS = 1 << 25


def work_limit(device: torch.device) -> int:
    """Elements of a piece on this device."""
    return CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS


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


def momentum_batches(local: Tensor, tiles: Sequence[Tile], size: Geometry) -> list[Tensor]:
    """The momentum of each tile: (E, N, blocks touched, R or bytes), or (E, N, W) where dense."""
    if size.rank is None:
        return as_batches(local, tiles, shape=size.shape)
    touched = [last - first for first, last in (tile.blocks(size.block) for tile in tiles)]
    if len(tiles) == 1:  # a rank may have places for more blocks than it touches
        batch = local.view(*tiles[0].sizes[:2], -1, size.width)
        return [batch[:, :, : touched[0]]]
    shapes = [(*t.sizes[:2], k, size.width) for t, k in zip(tiles, touched, strict=True)]
    return carve(local, shapes)


def inside(tile: Tile, piece: Tile) -> tuple[slice, slice]:
    """The matrices and rows of ``piece``, counted within ``tile``."""
    matrices = slice(piece.matrices[0] - tile.matrices[0], piece.matrices[1] - tile.matrices[0])
    rows = slice(piece.rows[0] - tile.rows[0], piece.rows[1] - tile.rows[0])
    return matrices, rows


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """What stands one after the other along the first dim; a single tensor itself."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
