# SPDX-License-Identifier: Apache-2.0
"""A whole matrix seen from its other side: what has fewer rows than columns is stepped transposed.

So ``compress="authors"`` combines the rows of a wide matrix, A W, by the code that combines the
columns of a tall one. Statistics, sketches and rounding see the transpose; weights and gradients
stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flora_dist.core.layouts.replicated import ReplicatedPart, whole
from flora_dist.core.protocols import Part
from flora_dist.core.state.spec import Geometry, StateTensor, grid_of
from flora_dist.core.tiles import Cuts, Interval, Tile, find_cuts


@dataclass(frozen=True, slots=True, eq=False)
class TransposedPart:
    """``Part`` of the transpose; see the module's docstring."""

    part: ReplicatedPart

    @property
    def name(self) -> str:
        """The parameter's own."""
        return self.part.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Columns, rows."""
        return self.part.shape[::-1]

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """One, of everything."""
        return whole(self.shape)

    @property
    def trains(self) -> bool:
        """As the parameter."""
        return self.part.trains

    @property
    def matrices(self) -> Interval:
        """One matrix."""
        return 0, 1

    @property
    def splits_matrices(self) -> bool:
        """Never: only whole matrices are transposed."""
        return False

    @property
    def column_shards(self) -> int:
        """Likewise."""
        return 1

    @property
    def reducer(self) -> None:
        """Likewise."""
        return

    def cuts(self, block: int) -> Cuts:
        """None."""
        return find_cuts((), grid_of(self.shape, block))

    def weight(self) -> Tensor:
        """A view."""
        return self.part.weight().t()

    def address(self) -> int:
        """Of the parameter's memory."""
        return self.part.address()

    def gradient(self) -> Tensor | None:
        """A view."""
        gradient = self.part.gradient()
        return None if gradient is None else gradient.t()

    def local_state_shape(self, entry: StateTensor) -> tuple[int, ...]:
        """All of it."""
        return entry.shape

    def allocate(self, entry: StateTensor, dtype: torch.dtype) -> Tensor:
        """Zeros where the parameter is."""
        return self.part.allocate(entry, dtype)

    def local(self, state: Tensor) -> Tensor:
        """The tensor itself."""
        return state


def as_stepped(part: Part, geometry: Geometry) -> Part:
    """The part as its geometry has it: itself, or transposed.

    Raises:
        ValueError: a rank holds a piece of the matrix, whose rows must be combined.
    """
    if geometry.shape == part.shape:
        return part
    if not isinstance(part, ReplicatedPart):
        raise ValueError(  # noqa: TRY004 - the user's mistake: one type for all of them
            f"compress='authors' combines the rows of a matrix, which must be whole; {part.name!r} "
            f"of shape {part.shape} has fewer rows than columns and is sharded here. Use "
            "compress='halving' for its group, or train on one process or DDP."
        )
    return TransposedPart(part)
