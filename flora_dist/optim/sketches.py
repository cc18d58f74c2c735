# SPDX-License-Identifier: Apache-2.0
"""The sketch matrices of parameters by window, kept from step to step where they are small.

Shape suffixes: E matrices, B block, R rank of the sketch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from flora_dist.optim.basis import SketchedBasis
from flora_dist.optim.config import FloraConfig
from flora_dist.sketch import keys, matrices
from flora_dist.tiles import Interval

# Sketches are kept between steps up to a share of the momentum they stand for, or this many
# numbers (16 KiB of fp32); larger ones, such as whole rows at rank 256, are made anew.
CACHED_NUMBERS = 1 << 12
CACHED_SHARE = 8


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
