# SPDX-License-Identifier: Apache-2.0
"""``Phases`` of a batch of matrices by Triton kernels; core/step/matrix.py has the formulas.

Terms have the names, shapes and meaning that they have there: ranks may run either. Every launch
covers all parameters of the batch, and nothing waits for the device.

Shape suffixes: H matrices that are here, M columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_dist.core.protocols import Terms
from flora_dist.core.step.batch import Batch, Moment
from flora_dist.core.step.elements import copy_to_
from flora_dist.core.step.momentum_rules import rule_of
from flora_dist.kernels.gpu.inputs import Given, Inputs, KernelBases, KernelBasis
from flora_dist.kernels.gpu.launches import Launches, Look, Needs
from flora_dist.kernels.native import make_terms


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
    """The same, and what the strict rule must sum still."""

    terms: Terms
    coupled: Coupled


class GpuPhases:
    """``Phases`` of a batch of whole rows on a GPU; see the module's docstring."""

    def __init__(self, batch: Batch, gradient_block: int = 0) -> None:
        """``gradient_block``: of gradients that are known by sketches; 0 of dense ones."""
        self._batch, self._needs = batch, _needs_of(batch)
        self._inputs, self._bases = Inputs(batch), KernelBases(batch)
        self._launches = Launches(batch, self._inputs, self._needs, gradient_block)
        self._columns = [
            member.local["column"].view(-1, batch.geometry.num_columns) for member in batch.members
        ]
        self._first_terms = list(self._terms_of_measure())

    def _terms_of_measure(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        batch, members = self._batch, len(self._batch.members)
        summed, columns = members * batch.matrices_summed, batch.geometry.num_columns
        yield "presence", (members,)
        yield "columns", (summed, columns)
        if self._needs.num_sums > 1:
            yield "squares", (summed, columns)
        if self._needs.history:
            yield "cross", (summed, columns)
            yield "history", (summed,)
        if self._needs.weight:
            yield "weight", (summed,)

    # ---- message 1

    def measure(self, now: Moment) -> Measured:
        """Sums of squares by column, and what RMS follows from."""
        return self.measure_sent(now, self.send(now))

    def send(self, now: Moment) -> Given:
        """Send what of a step is not in a graph that was recorded of an earlier one."""
        return self._inputs.write(now)

    def measure_sent(self, now: Moment, given: Given) -> Measured:
        """``measure``, by numbers that were sent."""
        with self._batch.device:
            _, terms = make_terms(self._first_terms)
        terms["presence"].fill_(1.0)
        basis = self._bases.of(now.basis)
        rows = torch.empty(0, device=self._batch.device)
        if not self._launches.is_empty:
            rows = self._launches.measure(given, basis, terms)
        return Measured(terms=terms, given=given, basis=basis, rows=rows)

    def take_rows(self, now: Moment, measured: Measured) -> None:
        """Never asked: rows are whole here."""
        del now, measured
        raise AssertionError("torch's operators step cut rows")

    def is_finite(self, measured: Measured) -> Tensor:
        """Whether this rank's gradients are (): NaN, inf and overflow reach their squares."""
        return measured.terms["columns"].sum().isfinite()

    def is_zero(self, measured: Measured) -> Tensor:
        """Whether this rank's gradients are all zeros ()."""
        return ~measured.terms["columns"].any()

    # ---- between the messages

    def couple(self, now: Moment, measured: Measured, totals: Terms) -> Coupled:
        """Normalisation is known now; rows and blocks are whole, and need no second message."""
        del now
        column_HM, factor_HM, sums_H2 = self._launches.settle(totals)
        look = Look(
            given=measured.given, basis=measured.basis, rows=measured.rows, factor_HM=factor_HM
        )
        return Coupled(terms={}, look=look, totals=totals, column_HM=column_HM, sums_H2=sums_H2)

    def tally(self, now: Moment, coupled: Coupled, totals: Terms) -> Tallied:
        """|U|^2 of the strict rule, which reads the new momentum."""
        del now, totals
        terms: Terms = {}
        if self._needs.update:
            summed = len(self._batch.members) * self._batch.matrices_summed
            terms["update"] = torch.zeros(summed, device=self._batch.device)
            if not self._launches.is_empty:
                self._launches.sum_update(coupled.look, terms["update"])
        return Tallied(terms=terms, coupled=coupled)

    # ---- the step itself

    def finish(self, now: Moment, tallied: Tallied, totals: Terms) -> None:
        """Clip, update weights and state."""
        del now
        coupled = tallied.coupled
        if not self._launches.is_empty:
            scales_H2 = self._launches.scale(coupled.sums_H2, {**coupled.totals, **totals})
            self._launches.finish(coupled.look, scales_H2)
        copy_to_(self._columns, coupled.column_HM)


def _needs_of(batch: Batch) -> Needs:
    rule, clips = rule_of(batch.config, batch.geometry), batch.config.clip is not None
    update = clips and rule is not None and rule.asks_update
    history = clips and rule is not None and rule.asks_history
    num_sums = 1
    if clips and not update:
        num_sums = 3 if history else 2
    return Needs(
        num_sums=num_sums, history=history, weight=batch.config.scales_matrices, update=update
    )
