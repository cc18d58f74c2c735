# SPDX-License-Identifier: Apache-2.0
"""A step of all batches by one call, or by two with a message between, not one for each phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flora_dist.core.step.batch import Moment
from flora_dist.kernels.inputs import gradients_of, keys_of, move_of, numbers_of
from flora_dist.kernels.native import NativePhases
from flora_dist.kernels.native_vector import NativeVectorPhases
from flora_dist.kernels.tables import floats

AnyPhases = NativePhases | NativeVectorPhases


class NativeStep:
    """``AtOnce`` by the compiled kernels: the same phases, with the same bits."""

    def __init__(self, phases: Sequence[AnyPhases], operators: Any) -> None:
        """``operators``: those of the loaded library."""
        self._phases, self._ops = phases, operators

    def __call__(self, moments: Sequence[Moment]) -> None:
        """Update weights and state of all batches."""
        given = _given(self._phases, moments)
        self._ops.step(*given.lists)

    def across(self) -> NativeAcross | None:
        """The same over ranks; None where a batch needs more than one message."""
        if not all(each.is_settled_by_one_message for each in self._phases):
            return None
        return NativeAcross(self._phases, self._ops)


class NativeAcross:
    """``Across`` by the compiled kernels."""

    def __init__(self, phases: Sequence[AnyPhases], operators: Any) -> None:
        """``operators``: those of the loaded library."""
        self._phases, self._ops = phases, operators
        self.terms = [each.make_terms()[1] for each in phases]
        rows = [0 if each.batch.geometry.is_vector else each.table.num_rows for each in phases]
        self._rows = torch.split(floats(sum(rows)), rows)
        self._places: list[int] = []
        for each, own, row in zip(phases, self.terms, self._rows, strict=True):
            is_exchanged = each.batch.members[0].cuts.peers is not None
            numbers = sum(term.numel() for term in own.values())
            start = own["presence"].data_ptr()
            self._places += start, numbers, row.data_ptr(), int(is_exchanged)

    def measure(self, moments: Sequence[Moment]) -> _Given:
        """Fill in the terms of message 1."""
        given = _given(self._phases, moments)
        self._ops.measure_all(*given.lists, self._places)
        return given

    def take_rows(self, begun: _Given) -> None:
        """Add the norms of cut rows that begin here to the terms, once peers gave the rows."""
        self._ops.take_rows_all(*begun.lists, self._places)

    def finish(self, begun: _Given) -> None:
        """Update weights and state of all batches."""
        self._ops.finish_all(*begun.lists, self._places)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What the kernels are told of a step."""

    lists: tuple[list[int], list[int], list[float], list[int]]
    """Of batches, gradients, numbers and keys."""
    kept: list[object]
    """What must outlive the addresses."""


def _given(phases: Sequence[AnyPhases], moments: Sequence[Moment]) -> _Given:
    batches: list[int] = []
    gradients: list[int] = []
    numbers: list[float] = []
    keys: list[int] = []
    kept: list[object] = []
    for each, now in zip(phases, moments, strict=True):
        given, own_keys, move = gradients_of(now), keys_of(each.batch, now), move_of(now.basis)
        tensors = (*each.bases.of(now.basis), move[0])
        is_vector = each.batch.geometry.is_vector
        batches += each.table.numbers.data_ptr(), int(is_vector), *map(_address, tensors)
        batches += move[1], len(given.numbers), len(own_keys)
        gradients += given.numbers
        numbers += numbers_of(each.batch, now)
        keys += own_keys
        kept += given, tensors
    return _Given(lists=(batches, gradients, numbers, keys), kept=kept)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
