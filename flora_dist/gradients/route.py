# SPDX-License-Identifier: Apache-2.0
"""Who averages a parameter's sketches, what each of them keeps, and the mean that came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from flora_dist.core.step.gradient import Records
from flora_dist.core.tiles import Tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Who averages a parameter's sketches, and what each of those ranks keeps."""

    kept: Sequence[tuple[Tile, ...]]
    """Tiles per rank of ``scatter``, in its order; without it, what everyone keeps."""
    scatter: dist.ProcessGroup | None = None
    """A reduce-scatter over these ranks; None: none."""
    sums: tuple[dist.ProcessGroup, ...] = ()
    """All-reduces after it, of what is kept: replicas."""
    divisor: float = 1.0
    """Of the sum: how many ranks it goes over."""

    @property
    def rank(self) -> int:
        """This rank's place in ``kept``."""
        return 0 if self.scatter is None else dist.get_rank(self.scatter)

    @property
    def weight_of_mean(self) -> float:
        """What ranks multiply by whose parts of a mean gradient are to be found in the mean."""
        return self.divisor / math.prod(dist.get_world_size(group) for group in self.sums)

    def numbers_sent(self, *, block: int, rank: int) -> int:
        """Numbers that this rank puts into the collectives of one step, for one parameter."""
        sizes = [sum(tile.num_blocks(block) for tile in tiles) * rank for tiles in self.kept]
        scattered = 0 if self.scatter is None else sum(sizes)
        return scattered + len(self.sums) * sizes[self.rank]

    @property
    def replica(self) -> int:
        """This rank's place among those that have gradients of the same elements.

        Shards of a replica follow each other, as in a mesh.
        """
        place = 0
        for group in (*self.sums, *([] if self.scatter is None else [self.scatter])):
            place = place * dist.get_world_size(group) + dist.get_rank(group)
        return place

    @property
    def travels(self) -> bool:
        """Whether anything is sent."""
        return self.scatter is not None or bool(self.sums)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """What this rank keeps of one parameter's mean."""

    tiles: tuple[Tensor | Records, ...]
    """Mean C (E, N, K, R) of each tile kept."""
    was_here: bool
    """Whether this rank had a gradient."""
    presence: Tensor | None
    """Above 0 if any rank had one, (); None: this rank alone decides."""
