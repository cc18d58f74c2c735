# SPDX-License-Identifier: Apache-2.0
"""Blocks of which several ranks hold pieces: their sketches are sums of partial ones.

Every holder keeps the block's momentum, equal by construction. Shape suffixes: S slots of cut
blocks, N rows, K blocks of a piece, R rank, E matrices, H matrices this rank touches.
"""

from __future__ import annotations

from torch import Tensor

from flora_dist.optim.basis import Basis, SketchedBasis
from flora_dist.optim.spec import Geometry
from flora_dist.tiles import Cuts, Interval, Tile


class CutBlocks:
    """Reads and writes the cut blocks of a piece's sketch."""

    def __init__(self, geometry: Geometry, cuts: Cuts) -> None:
        self._geometry = geometry
        self._cuts = cuts

    def add_partial_(self, slots_SR: Tensor, compressed_1NKR: Tensor, tile: Tile) -> None:
        """Add this piece's partial sketches to the message."""
        for block, place in self._edges(tile):
            slots_SR[self._slots(tile, block)] += compressed_1NKR[0, :, place]

    def fill_(
        self, compressed_1NKR: Tensor, totals_SR: Tensor, tile: Tile, factor: Tensor | None
    ) -> None:
        """Replace partial sketches by whole ones, times ``factor`` where X was scaled since."""
        for block, place in self._edges(tile):
            whole_NR = totals_SR[self._slots(tile, block)]
            if factor is not None:
                whole_NR = whole_NR * factor.view(1, 1)
            compressed_1NKR[0, :, place] = whole_NR

    def partial_square_sum(self, moved: Tensor, added: Tensor, basis: Basis, tile: Tile) -> Tensor:
        """This piece's share (E,) of |(moved + added) A|^2, but |added A|^2 of cut blocks.

        ``added`` of a cut block is partial: what is linear in it may be summed over the ranks, its
        square may not (``square_sum`` adds that).
        """
        edges = self._edges(tile)
        inner_ENKR = moved + added
        for _, place in edges:
            inner_ENKR[:, :, place] = 0
        total_E = basis.expand(inner_ENKR, tile).square().sum((1, 2))
        for block, place in edges:
            assert isinstance(basis, SketchedBasis)
            sketch_RW = self._sketch_of(basis, tile.matrices[0], block)
            moved_NW = moved[0, :, place] @ sketch_RW
            total_E += 2 * (moved_NW * (added[0, :, place] @ sketch_RW)).sum()
            if tile.columns[0] <= block * self._geometry.block:  # the block's first element
                total_E += moved_NW.square().sum()
        return total_E

    def square_sum(self, added_SR: Tensor, basis: Basis, held: Interval) -> Tensor:
        """|added A|^2 (H,) over the cut blocks, from whole sketches."""
        assert isinstance(basis, SketchedBasis)
        total_H = added_SR.new_zeros(held[1] - held[0])
        slot, num_rows = 0, self._geometry.num_rows
        for block, start, stop in self._cuts.runs_of_blocks():
            for matrix in range(start // num_rows, -(-stop // num_rows)):
                first, last = max(start, matrix * num_rows), min(stop, (matrix + 1) * num_rows)
                here = slice(slot + first - start, slot + last - start)
                if held[0] <= matrix < held[1]:
                    sketch_RW = self._sketch_of(basis, matrix, block)
                    total_H[matrix - held[0]] += (added_SR[here] @ sketch_RW).square().sum()
            slot += stop - start
        return total_H

    def _edges(self, tile: Tile) -> list[tuple[int, int]]:
        """Cut blocks of a piece: their number in the row and their place in the piece."""
        size = self._geometry
        first, _ = tile.blocks(size.block)
        return [(k, k - first) for k in tile.cut_blocks(size.block, size.num_columns)]

    def _slots(self, tile: Tile, block: int) -> slice:
        line = tile.matrices[0] * self._geometry.num_rows + tile.rows[0]
        start = self._cuts.block_slot(line, block)
        return slice(start, start + tile.sizes[1])

    def _sketch_of(self, basis: SketchedBasis, matrix: int, block: int) -> Tensor:
        """A (R, width of the block), of the new window."""
        size = self._geometry
        width = min(size.block, size.num_columns - block * size.block)
        return basis.new_ERB[matrix - basis.first_matrix, :, :width]
