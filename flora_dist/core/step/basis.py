# SPDX-License-Identifier: Apache-2.0
"""Where a momentum lives: in a sketch that changes with the window, or dense.

The matrices are a function of seed, name and window; small ones are kept from step to step.

Shape suffixes: E matrices, N rows, W columns here, K blocks here, B block, R rank of the sketch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from flora_dist.core.sketch import keys, matrices, ops
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.tiles import Interval

# Sketches are kept between steps up to a share of the momentum they stand for, or this many
# numbers (16 KiB of fp32); larger ones, such as whole rows at rank 256, are made anew.
CACHED_NUMBERS = 1 << 12
CACHED_SHARE = 8


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

    def correct_(
        self, x: ops.Blocks, new: Tensor, compressed: Tensor, place: Place, *, gain: float
    ) -> Tensor:
        """X + gain (rank/block) (M - c) A_new, in the memory of X; M itself where that is equal."""

    def add_(self, x: ops.Blocks, new: Tensor, place: Place, *, gain: float) -> Tensor:
        """X + gain (rank/block) M A_new, in the memory of X."""

    def move(self, momentum: Tensor, place: Place) -> Tensor:
        """M in the new window: s M A_old A_new^T where the window changed, M where not."""

    def spread(self, second: Tensor) -> Tensor:
        """Second moments in the new window: the block's mean where it changed, V where not."""


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

    def correct_(
        self, x: ops.Blocks, new: Tensor, compressed: Tensor, place: Place, *, gain: float
    ) -> Tensor:
        return self.add_(x, new - compressed, place, gain=gain)

    def add_(self, x: ops.Blocks, new: Tensor, place: Place, *, gain: float) -> Tensor:
        sketch_ERB = self.new_ERB[place.matrices]
        ops.add_expanded_(x, new, sketch_ERB, keep=1.0, factor=gain * self.gain)
        return x.elements_ENW

    def move(self, momentum: Tensor, place: Place) -> Tensor:
        if self.scale is None:
            return momentum
        if self.scale == 0.0:
            return torch.zeros_like(momentum)
        # M <- s M (A_old A_new^T)
        old_ERB, new_ERB = self.old_ERB[place.matrices], self.new_ERB[place.matrices]
        return self.scale * ops.change_basis(momentum, old_ERB, new_ERB)

    def spread(self, second: Tensor) -> Tensor:
        # A turned block has another number in every place; its mean square is what stays.
        return second if self.scale is None else second.mean(-1, keepdim=True).expand_as(second)


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

    def correct_(
        self, x: ops.Blocks, new: Tensor, compressed: Tensor, place: Place, *, gain: float
    ) -> Tensor:
        del place
        # Here c is X: with a gain of 1 the sum is M, but for what rounding would add.
        return new if gain == 1.0 else x.elements_ENW.add(new - compressed, alpha=gain)

    def add_(self, x: ops.Blocks, new: Tensor, place: Place, *, gain: float) -> Tensor:
        del place
        return x.elements_ENW.add_(new, alpha=gain)

    def move(self, momentum: Tensor, place: Place) -> Tensor:
        del place
        return momentum

    def spread(self, second: Tensor) -> Tensor:
        return second


class Sketches:
    """The sketch matrices of one part, by window; a pure function of seed, name and window."""

    def __init__(
        self,
        *,
        name_key: int,
        purpose: keys.Purpose,
        rank: int,
        block: int,
        config: FloraConfig,
        held: Interval,
        kept: int,
    ) -> None:
        """``held``: the matrices of this rank; ``kept``: numbers it keeps in their bases."""
        self._name_key, self._purpose = name_key, purpose
        self._limit = max(CACHED_NUMBERS, kept // CACHED_SHARE)
        self._rank, self._block = rank, block
        self._config, self._held = config, held
        self._cache: dict[int, Tensor] = {}

    @property
    def is_small(self) -> bool:
        """Whether the matrices are kept from step to step."""
        return (self._held[1] - self._held[0]) * self._rank * self._block <= self._limit

    @property
    def gain(self) -> float:
        """Rank / block."""
        return self._rank / self._block

    @property
    def is_hadamard(self) -> bool:
        """Whether A is some rows of a Hadamard matrix, times signs and ``entry_scale``."""
        return self._config.sketch == "hadamard"

    @property
    def transfer_scale(self) -> float:
        """S of a window change; 0: the momentum starts anew."""
        if self._config.transfer == "shrink":
            kind = self._config.sketch
            return matrices.shrink_factor(kind, rank=self._rank, block=self._block)
        return 1.0 if self._config.transfer == "paper" else 0.0

    @property
    def entry_scale(self) -> float:
        """The scalar in every entry of A: bfloat16 holds A over it exactly."""
        return matrices.entry_scale(self._config.sketch, rank=self._rank)

    def at(self, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A (E, R, B) of the matrices of this rank; small ones are kept from step to step."""
        cached = self._cache.get(window)
        if cached is not None and cached.dtype == dtype and cached.device == device:
            return cached
        sketch_ERB = matrices.sketch_matrices(
            self._config.sketch,
            keys=self._keys(window),
            rank=self._rank,
            block=self._block,
            dtype=dtype,
            device=device,
        )
        self._keep(window, sketch_ERB)
        return sketch_ERB

    def rounding_key(self, purpose: keys.Purpose, window: int, number: int = 0) -> int:
        """Of the random bits that round what is kept in these bases."""
        return keys.derive_key(
            seed=self._config.seed,
            name_key=self._name_key,
            purpose=purpose,
            window=window,
            matrix=number,
        )

    def _keys(self, window: int) -> list[int]:
        """One per matrix of this rank."""
        return [
            keys.derive_key(
                seed=self._config.seed,
                name_key=self._name_key,
                purpose=self._purpose,
                window=window,
                matrix=matrix,
            )
            for matrix in range(*self._held)
        ]

    def _keep(self, window: int, sketch_ERB: Tensor) -> None:
        if self.is_small:
            for past in [w for w in self._cache if w != window - 1]:
                del self._cache[past]
            self._cache[window] = sketch_ERB


def draw_together(
    wanted: Sequence[tuple[Sketches, int]], *, dtype: torch.dtype, device: torch.device
) -> None:
    """Draw the small sketches of many parameters in one pass, for ``Sketches.at`` to find.

    ``wanted``: with the window of each.
    """
    alike: dict[tuple[str, int, int], list[tuple[Sketches, int]]] = {}
    for sketches, window in wanted:
        if sketches.is_small and window not in sketches._cache:
            law = (sketches._config.sketch, sketches._rank, sketches._block)
            alike.setdefault(law, []).append((sketches, window))
    for (kind, rank, block), group in alike.items():
        own = [sketches._keys(window) for sketches, window in group]
        drawn = matrices.sketch_matrices(
            kind, keys=[*chain(*own)], rank=rank, block=block, dtype=dtype, device=device
        )
        parts = torch.split(drawn, [len(each) for each in own])
        for (sketches, window), sketch_ERB in zip(group, parts, strict=True):
            sketches._keep(window, sketch_ERB)


class BatchSketches:
    """The matrices of parameters that are stepped together, along one axis E.

    Several members only where each one's matrices are small.
    """

    def __init__(self, members: Sequence[Sketches]) -> None:
        self._members = members
        self._cache: dict[int, Tensor] = {}

    def change(
        self, old_window: int, new_window: int, *, dtype: torch.dtype, device: torch.device
    ) -> SketchedBasis:
        """The basis of a step that starts in ``old_window`` and ends in ``new_window``."""
        old_ERB = self._at(old_window, dtype, device)
        moved = old_window != new_window
        return SketchedBasis(
            old_ERB=old_ERB,
            new_ERB=self._at(new_window, dtype, device) if moved else old_ERB,
            scale=self._members[0].transfer_scale if moved else None,
            gain=self._members[0].gain,
        )

    def _at(self, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if len(self._members) == 1:
            return self._members[0].at(window, dtype, device)
        if window not in self._cache:
            draw_together([(each, window) for each in self._members], dtype=dtype, device=device)
            for past in [w for w in self._cache if w != window - 1]:
                del self._cache[past]
            self._cache[window] = torch.cat([m.at(window, dtype, device) for m in self._members])
        return self._cache[window]
