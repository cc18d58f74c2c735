# SPDX-License-Identifier: Apache-2.0
"""Where a momentum lives: in a sketch that changes with the window, or dense.

Shape suffixes: E matrices, N rows, W columns here, K blocks here, B block, R rank of the sketch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flora_dist.sketch import ops
from flora_dist.tiles import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a batch some rows stand."""

    matrices: slice
    """Among the matrices of the batch that are here."""
    columns: Interval
    """Of the whole rows."""


class Basis(Protocol):
    """Goes between rows at a place and the numbers kept for them."""

    @property
    def gain(self) -> float:
        """Rank / block; 1 where dense."""

    def room(self, like_ENW: Tensor, place: Place) -> ops.Blocks:
        """Elements (E, N, W) to be filled in, with zeros around them up to whole blocks."""

    def read(self, momentum: Tensor, place: Place) -> Tensor:
        """M A_old: the stored momentum as elements (E, N, W)."""

    def compress(self, x: ops.Blocks, place: Place) -> Tensor:
        """X A_new^T."""

    def expand(self, compressed: Tensor, place: Place) -> Tensor:
        """C A_new as elements (E, N, W)."""

    def mix_(self, x: ops.Blocks, momentum: Tensor, place: Place, *, beta: float) -> None:
        """X <- (1-b) X + b M A_old."""

    def correct_(self, x: ops.Blocks, correction: Tensor, place: Place, *, gain: float) -> None:
        """X <- X + gain (rank/block) D A_new; overwrites D where dense."""

    def move(self, momentum: Tensor, place: Place) -> Tensor:
        """M in the new window: s M A_old A_new^T where the window changed, M where not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchedBasis:
    """Blocks of a row times a sketch matrix; old and new window."""

    old_ERB: Tensor
    new_ERB: Tensor
    scale: float | None
    """s of a window change (0: reset); None: the window stays."""
    gain: float

    def room(self, like_ENW: Tensor, place: Place) -> ops.Blocks:
        return ops.make_room(like_ENW, self.new_ERB.shape[-1], first_column=place.columns[0])

    def read(self, momentum: Tensor, place: Place) -> Tensor:
        return self._expand(momentum, self.old_ERB, place)

    def compress(self, x: ops.Blocks, place: Place) -> Tensor:
        return ops.compress_blocks(x, self.new_ERB[place.matrices])

    def expand(self, compressed: Tensor, place: Place) -> Tensor:
        return self._expand(compressed, self.new_ERB, place)

    def _expand(self, compressed_ENKR: Tensor, sketch_ERB: Tensor, place: Place) -> Tensor:
        first, last = place.columns
        return ops.expand(
            compressed_ENKR,
            sketch_ERB[place.matrices],
            num_columns=last - first,
            first_column=first,
        )

    def mix_(self, x: ops.Blocks, momentum: Tensor, place: Place, *, beta: float) -> None:
        sketch_ERB = self.old_ERB[place.matrices]
        ops.add_expanded_(x, momentum, sketch_ERB, keep=1 - beta, factor=beta)

    def correct_(self, x: ops.Blocks, correction: Tensor, place: Place, *, gain: float) -> None:
        sketch_ERB = self.new_ERB[place.matrices]
        ops.add_expanded_(x, correction, sketch_ERB, keep=1.0, factor=gain * self.gain)

    def move(self, momentum: Tensor, place: Place) -> Tensor:
        if self.scale is None:
            return momentum
        if self.scale == 0.0:
            return torch.zeros_like(momentum)
        # M <- s M (A_old A_new^T)
        old_ERB, new_ERB = self.old_ERB[place.matrices], self.new_ERB[place.matrices]
        return self.scale * ops.change_basis(momentum, old_ERB, new_ERB)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseBasis:
    """A = I: the momentum is kept element by element and never changes its basis."""

    gain: float = 1.0

    def room(self, like_ENW: Tensor, place: Place) -> ops.Blocks:
        return ops.make_room(like_ENW, 1, first_column=place.columns[0])

    def read(self, momentum: Tensor, place: Place) -> Tensor:
        del place
        return momentum

    def compress(self, x: ops.Blocks, place: Place) -> Tensor:
        del place
        return x.elements_ENW

    def expand(self, compressed: Tensor, place: Place) -> Tensor:
        del place
        return compressed

    def mix_(self, x: ops.Blocks, momentum: Tensor, place: Place, *, beta: float) -> None:
        del place
        x.elements_ENW.mul_(1 - beta).add_(momentum, alpha=beta)

    def correct_(self, x: ops.Blocks, correction: Tensor, place: Place, *, gain: float) -> None:
        del place
        x.elements_ENW.add_(correction, alpha=gain)

    def move(self, momentum: Tensor, place: Place) -> Tensor:
        del place
        return momentum
