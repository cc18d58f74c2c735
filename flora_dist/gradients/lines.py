# SPDX-License-Identifier: Apache-2.0
"""Random bits for the sketches of a tile, by lines: the rows of all its matrices, one by one.

They are a function of the numbers' places in the whole parameter, so every layout draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flora_dist.core.state.spec import Geometry
from flora_dist.core.tiles import Interval, Tile
from flora_dist.kernels.records import Draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """The lines of a tile in the whole parameter, and the blocks that it touches."""

    geometry: Geometry
    intervals: tuple[Interval, ...]
    """Of the parameter's lines, in the order of the tile's."""
    blocks: Interval

    @classmethod
    def of(cls, geometry: Geometry, tile: Tile | None) -> Lines:
        """Of a tile; None: none."""
        empty = cls(geometry=geometry, intervals=(), blocks=(0, 0))
        return empty if tile is None else empty.within(tile)

    def within(self, tile: Tile) -> Lines:
        """Of another tile of the same parameter."""
        return replace(
            self,
            intervals=tuple(tile.lines(self.geometry.num_rows)),
            blocks=tile.blocks(self.geometry.block),
        )

    def draws(self, key: int, first: int, last: int) -> Draws:
        """Random bits (lines, K R) of lines ``first`` to ``last`` of the tile."""
        rank = self.geometry.rank
        assert rank is not None
        found, before = [], 0
        for start, stop in self.intervals:
            low, high = max(first - before, 0), min(last - before, stop - start)
            if low < high:
                found.append((start + low, start + high))
            before += stop - start
        return Draws(
            key=key,
            runs=tuple(found),
            columns=(self.blocks[0] * rank, self.blocks[1] * rank),
            num_columns=self.geometry.blocks_per_row * rank,
        )
