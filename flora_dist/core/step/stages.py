# SPDX-License-Identifier: Apache-2.0
"""What a phase of a batch of matrices hands to the next one, in torch's operators.

Shape suffixes: E matrices of a piece, H all that are here, P parameters, N rows, M columns, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flora_dist.core.protocols import Terms
from flora_dist.core.step.momentum_rules import Squares


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one look at the gradients tells."""

    terms: Terms
    rows: Mapping[int, Tensor]
    """The new R (E, N) of each piece of whole rows, by its place among the pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The normalisation, known from message 1."""

    rows: Mapping[int, Tensor]
    """The new R (E, N) of every piece."""
    column_HM: Tensor
    """The new C."""
    factor_HM: Tensor
    """What columns are multiplied by: sqrt(mean(R) / C)."""
    squares: Squares
    """Sums over whole rows."""
    weight_H: Tensor | None
    """|W|^2 where lr scales with it."""
    blocks: Tensor | None
    """Whole sketches of cut blocks (P, slots, R), once they are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupled:
    """The normalisation, and what of cut rows and blocks must be summed still."""

    terms: Terms
    settled: Settled


@dataclass(frozen=True, slots=True, kw_only=True)
class Tallied:
    """The same with the sums of message 2; ``flora_strict`` and ``apollo`` must sum |U|^2 still."""

    terms: Terms
    settled: Settled
    sums: Terms
