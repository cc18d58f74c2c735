# SPDX-License-Identifier: Apache-2.0
"""A gradient as the step reads it: element by element, or expanded from sketches where needed.

Shape suffixes: E matrices, N rows, W columns of a tile, K blocks it touches, B block, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flora_dist.sketch import ops
from flora_dist.tiles import Tile


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchedGradient:
    """This rank's share of a gradient that is known by its sketches alone; it stands for C A.

    Source: Flora (arXiv 2402.03293), Algorithm 1.
    """

    tiles: tuple[Tensor, ...]
    """C (E, N, K, R) of each tile of the part; whole for every block that a tile touches."""
    sketch_ERB: Tensor
    """A of the part's matrices, in the dtype of C."""
    first_matrix: int
    """Matrix that ``sketch_ERB`` begins with."""


class GradientTile(Protocol):
    """The gradient of some rows of a part."""

    def window(self, matrices: slice, rows: slice) -> GradientTile:
        """Some of its matrices and rows, counted within it."""

    def read(self, dtype: torch.dtype) -> Tensor:
        """Its elements (E, N, W), contiguous."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTile:
    """Elements that are there."""

    elements_ENW: Tensor

    def window(self, matrices: slice, rows: slice) -> DenseTile:
        return DenseTile(elements_ENW=self.elements_ENW[matrices, rows])

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.elements_ENW.to(dtype).contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchedTile:
    """Sketches of the blocks that hold the elements."""

    compressed_ENKR: Tensor
    sketch_ERB: Tensor
    first_column: int
    num_columns: int

    def window(self, matrices: slice, rows: slice) -> SketchedTile:
        return SketchedTile(
            compressed_ENKR=self.compressed_ENKR[matrices, rows],
            sketch_ERB=self.sketch_ERB[matrices],
            first_column=self.first_column,
            num_columns=self.num_columns,
        )

    def read(self, dtype: torch.dtype) -> Tensor:
        # G' = C A
        elements_ENW = ops.expand(
            self.compressed_ENKR,
            self.sketch_ERB,
            num_columns=self.num_columns,
            first_column=self.first_column,
        )
        return elements_ENW.to(dtype).contiguous()


def sketched_tiles(gradient: SketchedGradient, tiles: tuple[Tile, ...]) -> list[GradientTile]:
    """The sketched gradient of each tile of a part."""
    found: list[GradientTile] = []
    for tile, compressed_ENKR in zip(tiles, gradient.tiles, strict=True):
        first, stop = (matrix - gradient.first_matrix for matrix in tile.matrices)
        found.append(
            SketchedTile(
                compressed_ENKR=compressed_ENKR,
                sketch_ERB=gradient.sketch_ERB[first:stop],
                first_column=tile.columns[0],
                num_columns=tile.sizes[2],
            )
        )
    return found
