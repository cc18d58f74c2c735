# SPDX-License-Identifier: Apache-2.0
"""``Phases`` of a batch of matrices by the compiled kernels; core/step/matrix.py has the formulas.

Terms have the names, shapes and meaning that they have there: ranks may run either.

Shape suffixes: H matrices that are here, S those that are summed, P parameters, M columns, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flora_dist.core.protocols import Terms
from flora_dist.core.step.batch import Batch, Moment
from flora_dist.kernels.inputs import Bases, Given, gradients_of, keys_of, move_of, numbers_of
from flora_dist.kernels.tables import floats, make_table
from flora_dist.kernels.terms import first_terms, make_terms, second_terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one look at the gradients tells."""

    terms: Terms
    given: Given
    numbers: list[float]
    rows: Tensor
    """The new R of all tiles; that of cut rows is not known yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupled:
    """The normalisation, and what of cut rows and blocks must be summed still."""

    terms: Terms
    measured: Measured
    weight_S: Tensor | None
    """|W|^2 where lr scales with it."""
    column_HM: Tensor
    """The new C."""
    factor_HM: Tensor
    """What columns are multiplied by."""
    sums_H3: Tensor
    """|X|^2, <X, M A> and |M A|^2 of whole rows, in float64."""
    blocks: Tensor | None
    """Whole sketches of cut blocks (P, slots, R), once they are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tallied:
    """The same with the sums of message 2, and what the strict rule must sum still."""

    terms: Terms
    coupled: Coupled
    sums: Terms


class NativePhases:
    """``Phases`` of a batch of matrices on a CPU; see the module's docstring."""

    def __init__(self, batch: Batch, operators: Any) -> None:
        """``operators``: those of the loaded library."""
        self.batch, self._ops = batch, operators
        self.table = make_table(batch)
        self.bases = Bases()
        self._cuts = batch.members[0].cuts
        rule, bounds = self.table.rule, batch.config.bounds_matrices
        self._asks_update = bounds and rule is not None and rule.asks_update
        self._has_sketch = batch.geometry.rank is not None and rule is not None
        self._first_terms = list(first_terms(batch, self.table.num_sums))
        self._second_terms = list(second_terms(batch, self.table.num_sums))

    @property
    def is_settled_by_one_message(self) -> bool:
        """Whether a step follows from the sums of message 1."""
        return not self._second_terms and not self._asks_update

    def make_terms(self) -> tuple[Tensor, Terms]:
        """Message 1, of zeros: a buffer, and its terms."""
        return make_terms(self._first_terms, self.batch.device)

    def measure(self, now: Moment) -> Measured:
        """Sums of squares by column, what RMS follows from, and elements or squares of cut rows."""
        given, numbers = gradients_of(now), numbers_of(self.batch, now)
        buffer, terms = self.make_terms()
        if not now.is_missing:
            terms["presence"].fill_(1.0)
        rows = floats(self.table.num_rows)
        old, _, _ = self.bases.of(now.basis)
        self._ops.measure(self.table.numbers, given.numbers, numbers, old, rows, buffer)
        return Measured(terms=terms, given=given, numbers=numbers, rows=rows)

    def is_finite(self, measured: Measured) -> Tensor:
        """Whether this rank's gradients are (): NaN, inf and overflow reach their squares."""
        return measured.terms["columns"].sum().isfinite()

    def is_zero(self, measured: Measured) -> Tensor:
        """Whether this rank's gradients are all zeros ()."""
        return ~measured.terms["columns"].any()

    def take_rows(self, now: Moment, measured: Measured) -> None:
        """Add the norms of cut rows that begin here to the terms, once peers gave the rows."""
        del now
        terms = measured.terms
        self._ops.take_rows(
            self.table.numbers,
            measured.numbers,
            terms["elements"],
            terms.get("products"),
            measured.rows,
            terms.get("squares"),
            terms.get("cross"),
        )

    def couple(self, now: Moment, measured: Measured, totals: Terms) -> Coupled:
        """Normalisation is known now; what cut rows and cut blocks still need."""
        matrices = len(self.batch.members) * self.batch.matrices_here
        shape = (matrices, self.batch.geometry.num_columns)
        column_HM, factor_HM = floats(*shape), floats(*shape)
        sums_H3 = torch.empty((matrices, 3), dtype=torch.float64, device="cpu")
        basis = self.bases.of(now.basis)
        blocks = self._room_for_blocks()
        self._ops.settle(
            self.table.numbers,
            measured.numbers,
            totals["columns"],
            totals.get("squares"),
            totals.get("cross"),
            totals.get("history"),
            totals.get("rows"),
            totals.get("elements"),
            totals.get("products"),
            self._cuts.peers is None,
            basis[1],
            blocks,
            measured.rows,
            column_HM,
            factor_HM,
            sums_H3,
        )
        return Coupled(
            terms=self._couple_cuts(now, measured, factor_HM),
            measured=measured,
            weight_S=totals.get("weight"),
            column_HM=column_HM,
            factor_HM=factor_HM,
            sums_H3=sums_H3,
            blocks=blocks,
        )

    def _room_for_blocks(self) -> Tensor | None:
        """For whole sketches of cut blocks, where these follow from message 1."""
        if not (self._cuts.are_few and self._cuts.blocks_anywhere and self._has_sketch):
            return None
        assert self.batch.geometry.rank is not None
        members, slots = len(self.batch.members), len(self._cuts.blocks)
        return floats(members, slots, self.batch.geometry.rank)

    def _couple_cuts(self, now: Moment, measured: Measured, factor_HM: Tensor) -> Terms:
        if not self._second_terms:
            return {}
        buffer, terms = make_terms(self._second_terms, self.batch.device)
        self._ops.couple(
            self.table.numbers,
            measured.given.numbers,
            measured.numbers,
            *self.bases.of(now.basis),
            measured.rows,
            factor_HM,
            "squares" in terms,
            "cross" in terms,
            "blocks" in terms,
            buffer,
        )
        return terms

    def tally(self, now: Moment, coupled: Coupled, totals: Terms) -> Tallied:
        """|U|^2 of ``flora_strict`` and ``apollo``, which read what cut blocks have only now."""
        terms: Terms = {}
        coupled = replace(coupled, blocks=totals.get("blocks", coupled.blocks))
        if self._asks_update:
            summed = len(self.batch.members) * self.batch.matrices_summed
            terms["update"] = floats(summed).zero_()
            self._ops.tally(
                *self._common(now, coupled),
                coupled.factor_HM,
                coupled.blocks,
                terms["update"],
            )
        return Tallied(terms=terms, coupled=coupled, sums=totals)

    def finish(self, now: Moment, tallied: Tallied, totals: Terms) -> None:
        """Clip, update weights and state."""
        coupled, sums = tallied.coupled, tallied.sums
        self._ops.finish(
            *self._common(now, coupled),
            coupled.column_HM,
            coupled.factor_HM,
            coupled.sums_H3,
            sums.get("squares"),
            sums.get("cross"),
            totals.get("update"),
            coupled.weight_S,
            coupled.blocks,
            keys_of(self.batch, now),
        )

    def _common(self, now: Moment, coupled: Coupled) -> tuple[Any, ...]:
        """What comes first in every pass over U."""
        measured = coupled.measured
        return (
            self.table.numbers,
            measured.given.numbers,
            measured.numbers,
            *self.bases.of(now.basis),
            *move_of(now.basis),
            measured.rows,
        )
