# SPDX-License-Identifier: Apache-2.0
"""Blocks of which several ranks hold pieces: their sketches are sums of partial ones.

Every holder keeps the block's momentum, equal by construction. Shape suffixes: P parameters,
S slots of cut blocks, N rows, K blocks of a piece, R rank.
"""

from __future__ import annotations

from torch import Tensor

from flora_dist.optim.spec import Geometry
from flora_dist.tiles import Cuts, Tile


class CutBlocks:
    """Reads and writes the cut blocks of a piece's sketch; a piece has one matrix a parameter."""

    def __init__(self, geometry: Geometry, cuts: Cuts) -> None:
        self._geometry = geometry
        self._cuts = cuts

    def add_partial_(self, slots_PSR: Tensor, compressed_PNKR: Tensor, tile: Tile) -> None:
        """Add this piece's partial sketches to the message."""
        for block, place in self._edges(tile):
            slots_PSR[:, self._slots(tile, block)] += compressed_PNKR[:, :, place]

    def fill_(
        self, compressed_PNKR: Tensor, totals_PSR: Tensor, tile: Tile, factor: Tensor | None
    ) -> None:
        """Replace partial sketches by whole ones, times ``factor`` where X was scaled since."""
        for block, place in self._edges(tile):
            whole_PNR = totals_PSR[:, self._slots(tile, block)]
            if factor is not None:
                whole_PNR = whole_PNR * factor.view(-1, 1, 1)
            compressed_PNKR[:, :, place] = whole_PNR

    def _edges(self, tile: Tile) -> list[tuple[int, int]]:
        """Cut blocks of a piece: their number in the row and their place in the piece."""
        size = self._geometry
        first, _ = tile.blocks(size.block)
        return [(k, k - first) for k in tile.cut_blocks(size.block, size.num_columns)]

    def _slots(self, tile: Tile, block: int) -> slice:
        line = tile.matrices[0] * self._geometry.num_rows + tile.rows[0]
        start = self._cuts.block_slot(line, block)
        return slice(start, start + tile.sizes[1])
