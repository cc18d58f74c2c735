# SPDX-License-Identifier: Apache-2.0
"""A gradient as the step is given it: this rank's elements, their sketches, or nothing.

Shape suffixes: E matrices, N rows, K blocks a tile touches, B block, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


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


Gradient: TypeAlias = Tensor | SketchedGradient | None
"""None: this rank has none; where another one has, it counts as zero."""
