# SPDX-License-Identifier: Apache-2.0
"""Blocks of which several ranks hold pieces: their sketches are sums of partial ones.

Every holder keeps the block's momentum, equal by construction. Shape suffixes: P parameters with
one matrix each, S slots of cut blocks, N rows, K blocks of a piece, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flora_dist.core.state.spec import Geometry
from flora_dist.core.tiles import Cuts, Tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A cut block of a piece."""

    place: int
    """Among the blocks that the piece touches."""
    slots: slice
    """Of its rows among the cut blocks."""


def edges_of(tile: Tile, geometry: Geometry, cuts: Cuts) -> tuple[Edge, ...]:
    """The cut blocks of a tile of one matrix: at most two."""
    first, _ = tile.blocks(geometry.block)
    line = tile.matrices[0] * geometry.num_rows + tile.rows[0]
    edges = []
    for block in tile.cut_blocks(geometry.block, geometry.num_columns):
        start = cuts.block_slot(line, block)
        edges.append(Edge(place=block - first, slots=slice(start, start + tile.sizes[1])))
    return tuple(edges)


def add_partial_(slots_PSR: Tensor, compressed_PNKR: Tensor, edges: tuple[Edge, ...]) -> None:
    """Add a piece's partial sketches to the message."""
    for edge in edges:
        slots_PSR[:, edge.slots] += compressed_PNKR[:, :, edge.place]


def fill_(
    compressed_PNKR: Tensor, totals_PSR: Tensor, edges: tuple[Edge, ...], factor_P: Tensor | None
) -> None:
    """Replace partial sketches by whole ones, times ``factor`` where X was scaled since."""
    for edge in edges:
        whole_PNR = totals_PSR[:, edge.slots]
        if factor_P is not None:
            whole_PNR = whole_PNR * factor_P.view(-1, 1, 1)
        compressed_PNKR[:, :, edge.place] = whole_PNR
