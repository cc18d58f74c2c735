# SPDX-License-Identifier: Apache-2.0
"""``Phases`` of a batch of matrices by Triton kernels; core/step/matrix.py has the formulas.

Terms have the names, shapes and meaning that they have there: ranks may run either. Every launch
covers all parameters of the batch, and nothing waits for the device.

Shape suffixes: H matrices that are here, M columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flora_dist.core.protocols import Terms
from flora_dist.core.step.batch import Batch, Moment
from flora_dist.core.step.cut_rows import cut_rows_of
from flora_dist.core.step.elements import copy_to_
from flora_dist.kernels.gpu.context import Look, make_context
from flora_dist.kernels.gpu.inputs import Given, Inputs, KernelBases, KernelBasis
from flora_dist.kernels.gpu.launches import Launches
from flora_dist.kernels.terms import first_terms, make_terms, second_terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one look at the gradients tells."""

    terms: Terms
    given: Given
    basis: KernelBasis
    rows: Tensor
    """The new R of all strips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupled:
    """The normalisation."""

    terms: Terms
    look: Look
    totals: Terms
    """Of message 1."""
    column_HM: Tensor
    """The new C."""
    sums_H2: Tensor
    """|X|^2 and <X, M A>."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tallied:
    """The same, and what `flora_strict` and `apollo` must sum still."""

    terms: Terms
    coupled: Coupled


class GpuPhases:
    """``Phases`` of a batch of matrices on a GPU; see the module's docstring."""

    def __init__(self, batch: Batch, gradient_block: int = 0) -> None:
        """``gradient_block``: of gradients that are known by sketches; 0 of dense ones."""
        self._batch = batch
        self._inputs, self._bases = Inputs(batch), KernelBases(batch)
        of = make_context(batch, self._inputs, gradient_block)
        self._launches, self._is_empty = Launches(of), of.table.is_empty
        self._asks_update = of.needs.update
        self._cut_rows = cut_rows_of(batch)
        self._columns = [
            member.local["column"].view(-1, batch.geometry.num_columns) for member in batch.members
        ]
        self._first_terms = list(first_terms(batch, of.needs.num_sums))
        self._second_terms = list(second_terms(batch, of.needs.num_sums))

    # ---- message 1

    def measure(self, now: Moment) -> Measured:
        """Sums of squares by column, and what RMS follows from."""
        return self.measure_sent(now, self.send(now))

    def send(self, now: Moment) -> Given:
        """Send what of a step is not in a graph that was recorded of an earlier one."""
        return self._inputs.write(now)

    def measure_sent(self, now: Moment, given: Given) -> Measured:
        """``measure``, by numbers that were sent."""
        _, terms = make_terms(self._first_terms, self._batch.device)
        terms["presence"].fill_(float(not now.is_missing))
        basis = self._bases.of(now.basis)
        rows = torch.empty(0, device=self._batch.device)
        if not self._is_empty:
            rows = self._launches.measure(given, basis, terms)
        return Measured(terms=terms, given=given, basis=basis, rows=rows)

    def take_rows(self, now: Moment, measured: Measured) -> None:
        """Add the norms of cut rows that begin here to the terms, once peers gave the rows."""
        if self._cut_rows is not None:
            self._cut_rows.add_begun_(measured.terms, now)

    def is_finite(self, measured: Measured) -> Tensor:
        """Whether this rank's gradients are (): NaN, inf and overflow reach their squares."""
        return measured.terms["columns"].sum().isfinite()

    def is_zero(self, measured: Measured) -> Tensor:
        """Whether this rank's gradients are all zeros ()."""
        return ~measured.terms["columns"].any()

    # ---- between the messages

    def couple(self, now: Moment, measured: Measured, totals: Terms) -> Coupled:
        """Normalisation is known now; what cut rows and cut blocks still need."""
        if self._cut_rows is not None:
            self._cut_rows.complete_(totals, now)
        column_HM, factor_HM, sums_H2 = self._launches.settle(totals, measured.rows)
        look = Look(
            given=measured.given,
            basis=measured.basis,
            rows=measured.rows,
            factor_HM=factor_HM,
            blocks=totals.get("blocks"),
        )
        terms: Terms = {}
        if self._second_terms:
            _, terms = make_terms(self._second_terms, self._batch.device)
            self._launches.couple(look, terms)
        return Coupled(terms=terms, look=look, totals=totals, column_HM=column_HM, sums_H2=sums_H2)

    def tally(self, now: Moment, coupled: Coupled, totals: Terms) -> Tallied:
        """|U|^2 of `flora_strict` and `apollo`: the momentum of cut blocks is known only now."""
        del now
        coupled, terms = self._completed(coupled, totals), {}
        if self._asks_update:
            summed = len(self._batch.members) * self._batch.matrices_summed
            terms["update"] = torch.zeros(summed, device=self._batch.device)
            if not self._is_empty:
                self._launches.sum_update(coupled.look, terms["update"])
        return Tallied(terms=terms, coupled=coupled)

    def _completed(self, coupled: Coupled, totals: Terms) -> Coupled:
        """The same with the sums of message 2."""
        sums_H2, held = coupled.sums_H2, self._batch.held
        for place, name in enumerate(("squares", "cross")):
            if name in totals:
                sums_H2[:, place] += totals[name][held]
        look = replace(coupled.look, blocks=totals.get("blocks", coupled.look.blocks))
        return replace(coupled, look=look, sums_H2=sums_H2)

    # ---- the step itself

    def finish(self, now: Moment, tallied: Tallied, totals: Terms) -> None:
        """Clip, update weights and state."""
        del now
        coupled = tallied.coupled
        if coupled.sums_H2.numel():  # norms and sizes are kept where no element is, too
            scales_H2 = self._launches.scale(coupled.sums_H2, {**coupled.totals, **totals})
            if not self._is_empty:
                self._launches.finish(coupled.look, scales_H2)
        copy_to_(self._columns, coupled.column_HM)
