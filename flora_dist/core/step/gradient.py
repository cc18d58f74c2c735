# SPDX-License-Identifier: Apache-2.0
"""A gradient as the step is given it: this rank's elements, their sketches, or nothing.

Shape suffixes: E matrices, N rows, K blocks a tile touches, B block, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from flora_dist.core.records import Code
from flora_dist.core.sketch.quantise import read_records
from flora_dist.core.step.views import work_limit


@dataclass(slots=True, kw_only=True, eq=False)
class Records:
    """Sketches of one tile in few bits; read some rows at a time, so that all are never there."""

    octets: Tensor
    """uint8 (E, N, K, bytes)."""
    code: Code
    dtype: torch.dtype
    """Of the numbers."""
    factor: Tensor | None = None
    """Of all of them, (); None: 1."""

    def __getitem__(self, window: tuple[slice, ...]) -> Tensor:
        """C (E, N, K, R) of some matrices, rows and blocks."""
        numbers = read_records(self.octets[window], self.code, self.dtype)
        return numbers if self.factor is None else numbers.mul_(self.factor)

    def mul_(self, factor: Tensor | float) -> None:
        """C <- factor C."""
        own = torch.as_tensor(factor, dtype=self.dtype, device=self.octets.device)
        self.factor = own if self.factor is None else self.factor * own

    def to(self, device: torch.device) -> Records:
        """The same on another device."""
        return Records(
            octets=self.octets.to(device),
            code=self.code,
            dtype=self.dtype,
            factor=None if self.factor is None else self.factor.to(device),
        )

    def pieces(self) -> Iterator[Tensor]:
        """C (1, n, K, R), some rows of one matrix after the others."""
        matrices, rows, blocks, _ = self.octets.shape
        together = max(1, work_limit(self.octets.device) // max(1, blocks * self.code.numbers))
        for matrix in range(matrices):
            for row in range(0, rows, together):
                yield self[slice(matrix, matrix + 1), slice(row, row + together)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchedGradient:
    """This rank's share of a gradient that is known by its sketches alone; it stands for C A.

    Source: Flora (arXiv 2402.03293), Algorithm 1.
    """

    tiles: tuple[Tensor | Records, ...]
    """C (E, N, K, R) of each tile of the part; whole for every block that a tile touches."""
    sketch_ERB: Tensor
    """A of the part's matrices, in the dtype of C."""
    first_matrix: int
    """Matrix that ``sketch_ERB`` begins with."""


Gradient: TypeAlias = Tensor | SketchedGradient | None
"""None: this rank has none; where another one has, it counts as zero."""
