# SPDX-License-Identifier: Apache-2.0
"""``Phases`` of a batch of vectors by the compiled kernels; core/step/vector.py has the formulas.

Nothing is kept between the two passes but sums: the second one takes X from G again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flora_dist.core.protocols import Terms
from flora_dist.core.step.batch import Batch, Moment
from flora_dist.kernels.inputs import Bases, Given, gradients_of, keys_of, numbers_of
from flora_dist.kernels.tables import make_vector_table
from flora_dist.kernels.terms import make_terms

_SUMS = 4
"""``kVectorSums``: what is clipped squared, |W|^2, and the sums of V and of |G|, by tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one look at the gradients tells."""

    terms: Terms
    given: Given
    numbers: list[float]
    sums_T4: Tensor
    """By tile, in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summed:
    """The same with the sums of message 1; vectors have no other message."""

    terms: Terms
    measured: Measured
    sums: Terms


class NativeVectorPhases:
    """``Phases`` of a batch of vectors on a CPU; see the module's docstring."""

    def __init__(self, batch: Batch, operators: Any) -> None:
        """``operators``: those of the loaded library."""
        self.batch, self._ops = batch, operators
        self.table, self.bases = make_vector_table(batch), Bases()
        members = len(batch.members)
        names = ["presence", "update", *(["weight"] if batch.config.scales_vectors else [])]
        self._terms = [(name, (members,)) for name in names]

    is_settled_by_one_message: ClassVar[bool] = True

    def make_terms(self) -> tuple[Tensor, Terms]:
        """Message 1, of zeros: a buffer, and its terms."""
        return make_terms(self._terms, self.batch.device)

    def measure(self, now: Moment) -> Measured:
        """The squared norms of what is clipped, and of the weight where lr scales with it."""
        given, numbers = gradients_of(now), numbers_of(self.batch, now)
        buffer, terms = self.make_terms()
        if not now.is_missing:
            terms["presence"].fill_(1.0)
        sums_T4 = torch.empty((self.table.num_tiles, _SUMS), dtype=torch.float64, device="cpu")
        self._ops.measure_vector(self.table.numbers, given.numbers, numbers, sums_T4, buffer)
        return Measured(terms=terms, given=given, numbers=numbers, sums_T4=sums_T4)

    def is_finite(self, measured: Measured) -> Tensor:
        """Whether this rank's gradients are (): NaN, inf and overflow reach V."""
        return measured.sums_T4[:, 2].sum().isfinite()

    def is_zero(self, measured: Measured) -> Tensor:
        """Whether this rank's gradients are all zeros ()."""
        return ~measured.sums_T4[:, 3].any()

    def take_rows(self, now: Moment, measured: Measured) -> None:
        """Nothing: vectors have no rows that follow from other ranks' elements."""

    def couple(self, now: Moment, measured: Measured, totals: Terms) -> Summed:
        """No second message: nothing of a vector is shared but norms."""
        del now
        return Summed(terms={}, measured=measured, sums=totals)

    def tally(self, now: Moment, coupled: Summed, totals: Terms) -> Summed:
        """Nor a third."""
        del now, totals
        return coupled

    def finish(self, now: Moment, tallied: Summed, totals: Terms) -> None:
        """Clip, update weights and state."""
        del totals
        measured, sums = tallied.measured, tallied.sums
        self._ops.finish_vector(
            self.table.numbers,
            measured.given.numbers,
            measured.numbers,
            sums["update"],
            sums.get("weight"),
            keys_of(self.batch, now),
        )
