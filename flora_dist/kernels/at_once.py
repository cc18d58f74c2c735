# SPDX-License-Identifier: Apache-2.0
"""A whole step of all batches by one call, where no sums have to travel between the phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flora_dist.core.step.batch import Moment
from flora_dist.kernels.inputs import gradients_of, keys_of, move_of, numbers_of
from flora_dist.kernels.native import NativePhases
from flora_dist.kernels.native_vector import NativeVectorPhases


class NativeStep:
    """``AtOnce`` by the compiled kernels: the same phases, with the same bits."""

    def __init__(self, phases: Sequence[NativePhases | NativeVectorPhases], operators: Any) -> None:
        """``operators``: those of the loaded library."""
        self._phases, self._ops = phases, operators

    def __call__(self, moments: Sequence[Moment]) -> None:
        """Update weights and state of all batches."""
        batches: list[int] = []
        gradients: list[int] = []
        numbers: list[float] = []
        keys: list[int] = []
        kept: list[object] = []  # what must outlive the addresses
        for each, now in zip(self._phases, moments, strict=True):
            given, own_keys, move = gradients_of(now), keys_of(each.batch, now), move_of(now.basis)
            tensors = (*each.bases.of(now.basis), move[0])
            is_vector = each.batch.geometry.is_vector
            batches += each.table.numbers.data_ptr(), int(is_vector), *map(_address, tensors)
            batches += move[1], len(given.numbers), len(own_keys)
            gradients += given.numbers
            numbers += numbers_of(each.batch, now)
            keys += own_keys
            kept += given, tensors
        self._ops.step(batches, gradients, numbers, keys)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
